"""What a call takes at its peak beyond its arguments: on CUDA of the allocator, else of a fresh process."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench._harness import Skip

MIB = 2**20
SKIPPED = 3  # the exit status of a process whose variant cannot run here


def peak_on_cuda(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_of_process(module: str, *arguments: object) -> int:
    """Of `python -m module arguments`, which ends in `print_peak`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == SKIPPED:
        raise Skip(done.stdout.strip())
    done.check_returncode()
    return int(done.stdout)


def print_peak(threads: int, build: Callable[[], Callable[[], object]]) -> None:
    """Of the call that `build` returns. Before, `build` loads the libraries and starts the threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        call = build()
    except Skip as reason:
        print(reason)
        sys.exit(SKIPPED)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    print(peak)


def _resident(field: str) -> int:
    """VmRSS or its largest value so far, VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
