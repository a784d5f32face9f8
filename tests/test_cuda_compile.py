"""nvcc compiles every kernel, without torch and without a GPU, and no kernel spills or uses local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import pytest
from background import Job, each, run

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cuda.cu")) + sorted(
    (ROOT / "tests" / "cuda_emulator" / "kernels").glob("*.cu")
)
ARCHITECTURES = (80, 90)

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


def _compile(source: Path) -> CompletedProcess[str]:
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
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "cuda.o"
        return run([nvcc, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)])


JOBS = {str(source.relative_to(ROOT)): Job(partial(_compile, source), minutes=0.7) for source in SOURCES}


@each(JOBS)
def test_kernels_compile_without_spills(job: Job[CompletedProcess[str]]) -> None:
    compiled = job.result()
    assert compiled.returncode == 0, compiled.stderr
    kernels = list(KERNEL.finditer(compiled.stderr))
    assert {match["architecture"] for match in kernels} == {f"sm_{a}" for a in ARCHITECTURES}, compiled.stderr

    assert not any(map(uses_local_memory, kernels)), "spills or local memory:\n" + table(kernels)
    assert "warning" not in compiled.stderr, compiled.stderr
