"""What the compiler made of the CUDA kernels' hot loops, without a GPU: `python -m bench.sass`.

Compiles each csrc/<family>/cuda.cu for one architecture, disassembles it, and prints for every kernel its
registers and for each innermost loop that computes: the instructions of one round, how many of them are fused
multiply-adds and how many other floating-point arithmetic, and where its loads and stores go.

How to read it. Each of a multiprocessor's four schedulers issues one instruction a cycle at most, so the
share of arithmetic is the most of the peak that a loop can reach. LDS are loads of shared memory (.128: 16
bytes a thread), LDG of global memory, LDL of local memory (spills). LD is a generic load: the compiler could
not tell which memory it reads, and it is slower than either. A loop that the compiler has unrolled appears
with several rounds in one.

Needs nvcc and nvdisasm, of the CUDA toolkit or of the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = 90

FMA = ("FFMA", "DFMA", "HFMA2", "HMMA", "DMMA", "HGMMA")
ARITHMETIC = (*FMA, "FADD", "FMUL", "DADD", "DMUL", "MUFU")
MEMORY = ("LDS", "LDSM", "LDG", "LD", "LDL", "STS", "STG", "ST", "STL")


@dataclass(frozen=True)
class Loop:
    """One round of an innermost loop: how often each instruction stands in it, with its modifiers."""

    instructions: Counter[str]

    def count(self, *names: str) -> int:
        """How many instructions have such a name, whatever their modifiers."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in names)

    @property
    def size(self) -> int:
        return self.instructions.total()

    @property
    def fma(self) -> int:
        return self.count(*FMA)

    @property
    def arithmetic(self) -> int:
        return self.count(*ARITHMETIC)

    def memory(self) -> str:
        """The loads and stores, by width: "10 LDS.128, 2 STG"."""
        kinds: Counter[str] = Counter()
        for name, n in self.instructions.items():
            kind, *modifiers = name.split(".")
            if kind in MEMORY:
                width = next((f".{m}" for m in modifiers if m in ("64", "128")), "")
                kinds[kind + width] += n
        return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


@dataclass(frozen=True)
class Kernel:
    name: str  # name<template arguments>, where there is a demangler
    loops: tuple[Loop, ...]


def find_nvdisasm() -> str | None:
    """The disassembler: on PATH, beside nvcc, or in the package nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm")
    if found is None and (nvcc := shutil.which("nvcc")):
        found = shutil.which("nvdisasm", path=str(Path(nvcc).resolve().parent))
    if found is None:
        packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm"))
        found = str(packaged[0]) if packaged else None
    return found


def compile_cubin(source: Path, folder: Path, architecture: int) -> tuple[Path, dict[str, int]]:
    """Compiles as CMake does, for one architecture; the registers of each kernel."""
    cubin = folder / f"{source.parent.name}.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-arch=sm_{architecture}"]
    command = ["nvcc", *flags, f"-I{ROOT / 'csrc'}", "-cubin", "-o", str(cubin), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    kernel = re.compile(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", re.DOTALL)
    found = kernel.findall(result.stderr)
    names = demangled([name for name, _ in found])
    return cubin, {name: int(registers) for name, (_, registers) in zip(names, found, strict=True)}


def demangled(names: list[str]) -> list[str]:
    """name<template arguments>, without namespaces; as it is without a demangler."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = re.sub(
        r"\(anonymous namespace\)::|metafast::cuda::|metafast::|^void ", "", text, flags=re.MULTILINE
    )
    return [re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", line) for line in text.splitlines()]


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of a compiled file, disassembled."""
    tool = find_nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm: not found; it is in the CUDA toolkit and in nvidia-cuda-nvdisasm")
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\n\t?\.section\t?\s*\.text\.", text)[1:]
    names = demangled([section.split(",")[0] for section in sections])
    return [Kernel(name, tuple(_loops(section))) for name, section in zip(names, sections, strict=True)]


def _loops(section: str) -> Iterator[Loop]:
    """A loop is what lies between a label and a branch back to it; an innermost one holds no other."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?) ;", line):
            code.append(instruction[1])
    back = []
    for i, line in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", line)
        if branch and labels.get(branch[1], i + 1) <= i:
            back.append((labels[branch[1]], i))
    for first, last in sorted(set(back)):
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in back):
            continue
        yield Loop(Counter(_opcode(line) for line in code[first : last + 1]))


def _opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", line).split()[0]


def table(
    cubin: Path, registers: dict[str, int], least: int, only: str, without: str | None = None
) -> list[str]:
    lines = []
    for kernel in sorted(kernels(cubin), key=lambda kernel: kernel.name):
        loops = [loop for loop in kernel.loops if loop.arithmetic >= least]
        excluded = without is not None and without in kernel.name
        if only not in kernel.name or excluded or not loops:
            continue
        lines.append(f"{kernel.name}: {registers[kernel.name]} registers")
        for loop in sorted(loops, key=lambda loop: -loop.arithmetic):
            shares = f"{loop.arithmetic / loop.size:6.0%} {loop.fma / loop.size:6.0%}"
            lines.append(
                f"  {loop.size:12} {loop.arithmetic:10} {loop.fma:6} {shares}  {loop.memory()}".rstrip()
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds TEXT")
    parser.add_argument("--without", metavar="TEXT", help="no kernels whose name holds TEXT")
    parser.add_argument("--family", default="*", help="the folder of csrc; default: all")
    parser.add_argument("--architecture", type=int, default=ARCHITECTURE, help="default: %(default)s")
    parser.add_argument(
        "--least", type=int, default=16, metavar="N", help="loops of at least N arithmetic instructions"
    )
    args = parser.parse_args()
    if shutil.which("nvcc") is None or find_nvdisasm() is None:
        sys.exit("nvcc and nvdisasm are needed: of the CUDA toolkit, or nvidia-cuda-nvdisasm for the latter")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    compiler = f"nvcc {release[1] if release else 'unknown'}"
    print(f"Innermost loops of the CUDA kernels, sm_{args.architecture}, {compiler}")
    print(f"  {'instructions':>12} {'arithmetic':>10} {'FMA':>6} {'arith.':>6} {'FMA':>6}  loads and stores")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc").glob(f"{args.family}/cuda.cu")):
            compiled = compile_cubin(source, Path(folder), args.architecture)
            lines = table(*compiled, args.least, args.only, args.without)
            print(*([f"\n{source.relative_to(ROOT)}", *lines] if lines else []), sep="\n")


if __name__ == "__main__":
    main()
