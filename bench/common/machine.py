"""What the machine is, and what it can do: the measured peaks that the floors are made of."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.common.clock import Clock
from metafast import _C

GIB = 2**30
PACKAGES = (
    "metafast",
    "torch",
    "jax",
    "easyfsl",
    "pytorch-metric-learning",
    "learn2learn",
    "higher",
    "torchopt",
)


@dataclass(frozen=True)
class Peak:
    flops: float  # float32 matrix products, per second
    bandwidth: float  # bytes per second
    exponentials: float | None  # float32, of what need not come from memory, per second; None: not measured
    fma: float | None = None  # float32 operations of FMAs on registers alone, per second; None: not measured

    @property
    def arithmetic(self) -> float:
        """What no arithmetic is faster than, as far as was measured."""
        return max(self.flops, self.fma or 0.0)

    def __str__(self) -> str:
        fma = f"FMA peak {self.fma / 1e9:.0f} GFLOP/s, " if self.fma else ""
        exponentials = f"{self.exponentials / 1e9:.1f} G exponentials/s, " if self.exponentials else ""
        return (
            f"sgemm peak {self.flops / 1e9:.0f} GFLOP/s, {fma}{exponentials}"
            f"bandwidth {self.bandwidth / 1e9:.1f} GB/s"
        )


def measure_peak(clock: Clock, quick: bool, exponentials: bool, fma: bool = False) -> Peak:
    # 1 GiB, larger than the cache. Reading and copying differ in speed; the faster makes the lower floor.
    source = torch.ones((GIB >> (3 if quick else 0)) // 4, device=clock.device)
    target = torch.empty_like(source)
    read = min(clock(source.sum) for _ in range(5))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
    return Peak(
        product_rate(clock, 1024 if quick else 4096),
        max(source.nbytes / read, 2 * source.nbytes / copy),
        _exponentials(clock) if exponentials else None,
        _fma(torch.get_num_threads()) if fma and clock.device.type == "cpu" else None,
    )


def product_rate(clock: Clock, size: int) -> float:
    """Operations per second of the library's product of float32 matrices, as torch's switches have it."""
    a, b = (torch.randn(size, size, device=clock.device) for _ in range(2))
    return 2 * size**3 / min(clock(lambda: a @ b) for _ in range(5))


# For the instruction set that metafast's kernels take here, as cmake/family.cmake has them.
_ISA_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]}


def _fma(threads: int) -> float | None:
    """Of all threads at once; None without a C compiler. A library's sgemm may reach less than half of it:
    which instructions MKL takes depends on who made the processor."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        library, source = f"{folder}/fma.so", str(Path(__file__).with_name("fma.c"))
        flags = ["-O3", *_ISA_FLAGS[_C.active_isa()], "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        function = ctypes.CDLL(library).multiply_and_add  # which leaves Python's lock to the others
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
        start = threading.Barrier(threads)

        def run(_: int) -> tuple[float, float, float]:
            start.wait()
            began = time.perf_counter()
            return function(500_000), began, time.perf_counter()

        def once() -> float:
            counts, began, ended = zip(*pool.map(run, range(threads)), strict=True)
            return sum(counts) / (max(ended) - min(began))

        return max(once() for _ in range(20))


def _exponentials(clock: Clock) -> float:
    """On the CPU torch.exp of an array that the cache holds.

    A GPU's units are faster than its memory brings numbers, and an array that its cache holds is done sooner
    than the next launch. So there many in a row for each number, in one kernel by torch.compile, on an array
    that takes about a millisecond.
    """
    if clock.device.type == "cpu":
        cached = torch.randn(2**18)
        result = torch.empty_like(cached)
        return cached.numel() / min(clock(lambda: torch.exp(cached, out=result), 50) for _ in range(5))
    large = torch.rand(2**26, device=clock.device)
    chain = torch.compile(exponential_chain)
    chain(large)
    return CHAIN * large.numel() / min(clock(lambda: chain(large)) for _ in range(10))


CHAIN = 16


def exponential_chain(x: Tensor) -> Tensor:
    for _ in range(CHAIN):
        x = torch.exp(-x)
    return x


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        dirty = git("status", "--porcelain", f"{root}/csrc", f"{root}/metafast")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an exported tree


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def describe(device: torch.device, threads: int) -> dict[str, object]:
    """The machine and the versions, as a report names them."""
    return {
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": _C.active_isa(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in PACKAGES},
    }
