"""nvcc compiles every kernel, without torch and without a GPU, and no kernel spills or uses local memory; and
the C++ around them compiles as it does beside a torch with CUDA.

The hot loops of kernels whose operands lie in shared memory load them as such; bench/sass.py says why that
matters.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from background import Job, each, run
from torch.utils.cpp_extension import include_paths

from bench import sass

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cuda.cu")) + sorted(
    (ROOT / "tests" / "cuda_emulator" / "kernels").glob("*.cu")
)
ARCHITECTURES = (80, 90)
NEWEST = 100  # for families whose compilation takes no minutes
ON_NEWEST = ("common", "convolutional", "pairwise")

# Of a family the kernels, by the beginning of their names, none of whose loops with at least so many
# arithmetic instructions has a generic load or store: the compiler knows where their operands lie.
RESIDENT = {
    "csrc/convolutional/cuda.cu": (
        *(("convolve<", 128), ("convolve<TensorTile", 8), ("convolve_weights<", 64)),
        ("thin_gradient_sums<true", 128),
    ),
    "csrc/inner_loop/cuda.cu": tuple(
        (f"adapt<Team<{team}>, Resident, float>", 16) for team in ("32, 4", "64, 1", "256, 1")
    ),
    "csrc/learned_optimizer/cuda.cu": (("lstm_unroll_tiles", 16), ("lstm_unroll_tiles_backward", 16)),
    "csrc/pairwise/cuda.cu": (("classify<", 16), ("classify_backward<", 16), ("relation_layer<", 64)),
}

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<memory>[^\n]*)",
    re.DOTALL,
)


def table(kernels: list[re.Match[str]]) -> str:
    """Registers, stack and spills of each kernel, those at fault first."""
    rows = [
        f"{k['architecture']:6} {k['registers']:>9} {k['stack']:>6} {k['stores']:>7} {k['loads']:>6}  "
        f"{k['name']}"
        for k in sorted(kernels, key=uses_local_memory, reverse=True)
    ]
    text = "\n".join([f"{'arch':6} {'registers':>9} {'stack':>6} {'stores':>7} {'loads':>6}  kernel", *rows])
    demangler = shutil.which("c++filt")
    if demangler is None:
        return text
    return subprocess.run([demangler], input=text, capture_output=True, text=True, check=True).stdout


def uses_local_memory(kernel: re.Match[str]) -> bool:
    return any(int(kernel[what]) > 0 for what in ("stack", "stores", "loads")) or "lmem" in kernel["memory"]


class Compiled(NamedTuple):
    process: CompletedProcess[str]
    kernels: list[sass.Kernel]  # of ARCHITECTURES[-1], disassembled; none without a disassembler


def architectures_of(source: Path) -> tuple[int, ...]:
    return (*ARCHITECTURES, *((NEWEST,) if source.parent.name in ON_NEWEST else ()))


def _compile(source: Path) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    flags = [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
        "-t",
        "0",
    ]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures_of(source)]
    with TemporaryDirectory() as folder:
        keep = ["--keep", f"--keep-dir={folder}"]  # what is compiled for each architecture
        out = Path(folder) / "cuda.o"
        process = run([nvcc, *flags, *keep, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)])
        looked_at = str(source.relative_to(ROOT)) in RESIDENT and sass.find_nvdisasm() is not None
        if not looked_at or process.returncode != 0:
            return Compiled(process, [])
        return Compiled(process, sass.kernels(Path(folder) / f"cuda.compute_{ARCHITECTURES[-1]}.cubin"))


JOBS = {str(source.relative_to(ROOT)): Job(partial(_compile, source), minutes=0.7) for source in SOURCES}


@each(JOBS)
def test_kernels_compile_without_spills(job: Job[Compiled], request: pytest.FixtureRequest) -> None:
    compiled = job.result().process
    expected = {f"sm_{a}" for a in architectures_of(ROOT / request.node.callspec.id)}
    assert compiled.returncode == 0, compiled.stderr
    kernels = list(KERNEL.finditer(compiled.stderr))
    assert {match["architecture"] for match in kernels} == expected, compiled.stderr

    assert not any(map(uses_local_memory, kernels)), "spills or local memory:\n" + table(kernels)
    assert "warning" not in compiled.stderr, compiled.stderr


@each({source: JOBS[source] for source in RESIDENT})
def test_hot_loops_know_that_their_operands_are_shared(
    job: Job[Compiled], request: pytest.FixtureRequest
) -> None:
    kernels = job.result().kernels
    if not kernels:
        pytest.skip("no nvdisasm to look at the loops with: neither on PATH nor package nvidia-cuda-nvdisasm")
    for name, least in RESIDENT[request.node.callspec.id]:
        loops = [
            (kernel.name, loop)
            for kernel in kernels
            if kernel.name.startswith(name)
            for loop in kernel.loops
            if loop.arithmetic >= least
        ]
        assert any(loop.count("LDS") > 0 for _, loop in loops), f"no such loop in any {name}...>"
        generic = [f"{kernel}: {loop.memory()}" for kernel, loop in loops if loop.count("LD", "ST") > 0]
        assert not generic, "\n".join(generic)


HOST = sorted((ROOT / "csrc").rglob("*op.cpp"))


def _check_host(source: Path) -> CompletedProcess[str]:
    """As a build with CUDA sees it. Torch without CUDA has all the headers that this takes but one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    with TemporaryDirectory() as folder:
        missing = Path(folder) / "c10/cuda/impl/cuda_cmake_macros.h"
        missing.parent.mkdir(parents=True)
        missing.touch()
        system = [*include_paths(), sysconfig.get_path("include"), folder]
        flags = ["-std=c++20", "-Xcompiler=-fsyntax-only,-fopenmp,-Wall,-Wextra,-Werror"]
        flags += ["-DMETAFAST_WITH_CUDA", "-DMETAFAST_NAMESPACE=metafast", f"-I{ROOT / 'csrc'}"]
        flags += [f"-isystem={path}" for path in system]
        return run([nvcc, *flags, "-c", str(source), "-o", str(Path(folder) / "none.o")])


@each({str(path.relative_to(ROOT)): Job(partial(_check_host, path), minutes=0.3) for path in HOST})
def test_the_ops_compile_with_cuda(job: Job[CompletedProcess[str]]) -> None:
    assert job.result().returncode == 0, job.result().stderr
