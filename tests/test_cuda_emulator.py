"""The CUDA emulator: it runs correct kernels right under every schedule, and stops at faulty ones."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
KERNELS = EMULATOR / "kernels"
SEEDS = range(8)

CXX = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler on PATH")


def build(folder: Path, source: str, *flags: str) -> Path:
    """Compiles one file of kernels/ and the emulator into a shared library."""
    library = folder / f"{source}.so"
    includes = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    sources = [str(EMULATOR / "emulator.cpp"), "-x", "c++", str(KERNELS / f"{source}.cu")]
    common = [
        "-std=c++20",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run([CXX, *common, *flags, *includes, *sources, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module", params=["switch by hand", "ucontext"])
def correct(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ["-DMETAFAST_EMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("correct"), "reductions", *flags)))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faulty"), "faults")


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def set_seed(library: ctypes.CDLL, seed: int) -> None:
    library.metafast_emulator_set_seed(ctypes.c_uint64(seed))


def test_block_reduction_has_the_same_bits_under_every_schedule(correct: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((5, 333)).astype(np.float32)
    results = []
    for seed in SEEDS:
        set_seed(correct, seed)
        out = np.full(5, np.nan, np.float32)
        correct.run_row_sum(pointer(x), pointer(out), *x.shape)
        results.append(out)
    np.testing.assert_allclose(results[0], x.sum(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(result, results[0]) for result in results)


def test_asynchronous_copies_and_the_last_block(correct: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((5, 333)).astype(np.float32)
    counter, results = np.zeros(1, np.uint64), []
    for seed in SEEDS:
        set_seed(correct, seed)
        partial, out = np.full(5, np.nan, np.float32), np.full(1, np.nan, np.float32)
        correct.run_grid_sum(*map(pointer, (x, partial, counter, out)), *x.shape)
        assert counter == 0  # for the next launch
        results.append(out)
    np.testing.assert_allclose(results[0], x.sum(dtype=np.float64), rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_ballots(correct: ctypes.CDLL, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((12, 32))
    out, positive = np.empty_like(x), np.empty(12, np.int32)
    set_seed(correct, seed)
    correct.run_warp_scan(pointer(x), pointer(out), pointer(positive), x.size)
    np.testing.assert_allclose(out, np.cumsum(x, axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(positive, (x > 0).sum(axis=1))


def test_tensor_cores_reach_the_accuracy_of_float32(correct: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    a, b, out = (generator.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    expected = out + a.astype(np.float64) @ b
    correct.run_tensor_core_product(pointer(a), pointer(b), pointer(out))
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


def test_block_votes(correct: ctypes.CDLL) -> None:
    x = np.zeros((3, 128), np.int32)
    x[1, 5] = 1
    x[2] = 1
    out = np.empty((3, 3), np.int32)
    correct.run_block_vote(pointer(x), pointer(out), 3)
    assert out.tolist() == [[0, 0, 0], [1, 1, 0], [128, 1, 1]]


def test_shared_memory_above_48_kib(correct: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    out = np.empty_like(x)
    correct.run_transpose(pointer(x), pointer(out))
    np.testing.assert_array_equal(out, x.T)


def test_half_precision_rounds_as_numpy(correct: ctypes.CDLL) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.arange(0x10000, dtype=np.uint16).view(np.float16)
        expected = (x.astype(np.float32) * np.float32(0.7)).astype(np.float16)
    out = np.empty_like(x)
    correct.run_scale_half(pointer(x), pointer(out), ctypes.c_int64(x.size), ctypes.c_float(0.7))
    np.testing.assert_array_equal(out, expected)  # all halves: subnormal, infinite, NaN


def test_bfloat16_rounds_as_torch(correct: ctypes.CDLL) -> None:
    torch = pytest.importorskip("torch")
    x = np.arange(0x10000, dtype=np.uint16)
    out = np.empty_like(x)
    correct.run_scale_bfloat16(pointer(x), pointer(out), ctypes.c_int64(x.size), ctypes.c_float(0.7))
    inputs, results = (torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (x, out))
    torch.testing.assert_close(results, (inputs.float() * 0.7).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_vector_access_and_empty_grids(correct: ctypes.CDLL, size: int) -> None:
    x = np.arange(size, dtype=np.float32)
    out = np.empty_like(x)
    correct.run_scale_float(pointer(x), pointer(out), ctypes.c_int64(size), ctypes.c_float(3))
    np.testing.assert_array_equal(out, 3 * x)


def test_a_refused_launch_names_the_kernel(correct: ctypes.CDLL) -> None:
    correct.launch_too_large.restype = ctypes.c_char_p
    assert correct.launch_too_large() == (
        b"metafast: launch of CUDA kernel warp_scan failed: invalid configuration argument"
    )


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("missing_barrier", lambda x: x[::-1]),
        ("missing_second_barrier", lambda x: np.roll(x, -2)),
        ("missing_syncwarp", lambda x: x.reshape(-1, 2)[:, ::-1].ravel()),
    ],
)
def test_a_missing_barrier_shows_in_the_result(faulty: Path, kernel: str, expected) -> None:
    library = ctypes.CDLL(str(faulty))
    x = np.arange(128, dtype=np.float32)
    wrong = 0
    for seed in SEEDS:
        out = np.empty_like(x)
        set_seed(library, seed)
        getattr(library, f"run_{kernel}")(pointer(x), pointer(out))
        wrong += not np.array_equal(out, expected(x))
    assert wrong > 0


def run_alone(library: Path, kernel: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a kernel of faults.cu in a process of its own, because it is going to abort."""
    code = f"import ctypes; x = (ctypes.c_float * 128)(); ctypes.CDLL({str(library)!r}).run_{kernel}(x, x)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("kernel", "messages"),
    [
        (
            "barrier_after_exit",
            ["divergent barrier", "127 of 128 threads wait at __syncthreads", "1 of 128 threads exited"],
        ),
        (
            "barrier_in_branch",
            ["divergent barrier", "32 of 128 threads wait at", "96 of 128 threads wait at"],
        ),
        (
            "barrier_against_shuffle",
            ["divergent barrier", "wait at __syncthreads", "wait at __shfl_xor_sync"],
        ),
        ("shuffle_from_inactive_lane", ["__shfl_xor_sync", "reads from an inactive lane"]),
        ("shuffle_with_missing_lanes", ["__shfl_xor_sync", "the mask names inactive lanes"]),
    ],
)
def test_a_fault_aborts_with_a_message(faulty: Path, kernel: str, messages: list[str]) -> None:
    result = run_alone(faulty, kernel)
    assert result.returncode == -signal.SIGABRT
    assert "metafast emulator: " in result.stderr
    assert "faults.cu:" in result.stderr
    for message in messages:
        assert message in result.stderr


def test_address_sanitizer_sees_the_end_of_shared_memory(tmp_path: Path) -> None:
    runtime = subprocess.run(
        [CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{CXX} has no AddressSanitizer")
    library = build(tmp_path, "faults", "-fsanitize=address", "-fno-omit-frame-pointer")
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    fault = run_alone(library, "shared_overrun", **environment)
    assert fault.returncode != 0
    assert "heap-buffer-overflow" in fault.stderr
    assert "shared_overrun" in fault.stderr
    # It knows the fibers' stacks: a kernel within bounds raises nothing.
    assert run_alone(library, "missing_barrier", **environment).returncode == 0
