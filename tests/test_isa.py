"""This machine plays others: the ops again with the instruction sets and the threads that those have.

torch's own kernels, oneDNN's and MKL's choose theirs as metafast's do, and the ops stand on all of them.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import torch
from background import Job, each, run

from metafast import _C

ROOT = Path(__file__).parent.parent
# All ops and dtypes, odd sizes, none at all, first and second derivatives; large ones; and the op in place.
FILES = ("contract", "in_place", "task_ops", "pairwise_large", "inner_loop_large")
PARITY = (
    "(test_parity or test_sizes or test_second_order_parity or test_large_networks or 16_bit) "
    "and not emulated and not cuda"
)

# What chooses instruction sets: metafast, torch, oneDNN, MKL. Where one has no such name it takes the best.
CHOOSERS = ("METAFAST_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
BEST = _C.detected_isa()
AVAILABLE = _C.build_info()["isas"][: _C.build_info()["isas"].index(BEST) + 1]  # worst first
MACHINES = {
    name: dict(zip((*CHOOSERS, "OMP_NUM_THREADS"), choices, strict=True))
    for name, choices in {
        "SSE4.1, 1 thread": ("baseline", "default", "SSE41", "SSE4_2", "1"),
        "AVX2, 2 threads": ("avx2", "avx2", "AVX2", "AVX2", "2"),
    }.items()
    if choices[0] in AVAILABLE
}
# This machine itself, with another number of threads than the tests around this one.
OTHER_THREADS = 1 if torch.get_num_threads() > 1 else 2
MACHINES[f"{BEST}, {OTHER_THREADS} thread{'s' * (OTHER_THREADS > 1)}"] = {
    "METAFAST_CPU_ISA": BEST,
    "OMP_NUM_THREADS": str(OTHER_THREADS),
}


def _parity(machine: dict[str, str]) -> CompletedProcess[str]:
    here = {name: value for name, value in os.environ.items() if name not in CHOOSERS}
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in FILES]
    return run([*pytest_again, *files, "-k", PARITY], cwd=ROOT, env=here | machine)


JOBS = {name: Job(partial(_parity, machine), minutes=0.5) for name, machine in MACHINES.items()}


@each(JOBS)
def test_parity_on(job: Job[CompletedProcess[str]]) -> None:
    result = job.result()
    assert result.returncode == 0, result.stdout + result.stderr
