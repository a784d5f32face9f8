"""What a call takes at its peak beyond its arguments: on CUDA of the allocator, else of a fresh process."""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.common.cases import Skip, verdict_line
from bench.common.in_jax import JaxCall
from bench.common.run import Run

MIB = 2**20


class Workload(Protocol):
    def problem(self, device: torch.device) -> Any: ...


Build = Callable[[Any], Callable[[], object]]  # of a workload's problem, the call to measure


def peak_bytes(build: Build, workload: Workload, small: Workload, options: argparse.Namespace) -> int:
    """`small` is a workload of the same kind, which loads the libraries and starts the threads before."""
    if options.device.type == "cuda":
        return _peak_on_cuda(build(workload.problem(options.device)))
    # A fresh process: what another variant freed would be used again, and count as nothing.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_here, build, workload, small, options.threads).result()


def _peak_on_cuda(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _peak_here(build: Build, workload: Workload, small: Workload, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    build(small.problem(torch.device("cpu")))()
    call = build(workload.problem(torch.device("cpu")))
    if isinstance(call, JaxCall):
        call()  # compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return peak


def _resident(field: str) -> int:
    """VmRSS or its largest value so far, VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class MemoryTable:
    """The peak memory of `variants`, "metafast" and others, on workloads: a row for each."""

    variants: Mapping[str, Build]  # module-level functions, or partials of such: they go to another process
    workloads: Callable[[torch.device, bool], Sequence[Workload]]  # device, quick
    small: Callable[[Workload], Workload]
    # What else stands in a row: name -> bytes of a workload and a number of threads.
    stated: Mapping[str, Callable[[Any, int], int]] = field(default_factory=dict)
    judge: Callable[[Mapping[str, Any]], dict[str, object]] | None = None  # a row's bytes -> a verdict

    def __call__(self, run: Run) -> list[dict[str, object]]:
        options, say = run.options, run.report.say
        cuda = options.device.type == "cuda"
        names = [n for n in self.variants if not cuda or n != "JAX"]  # which has its own allocator there
        stated = {} if cuda else self.stated  # of the CPU's kernels
        workloads = self.workloads(options.device, options.quick)
        columns, width = [*names, *stated], max(len(str(w)) for w in workloads)
        say("\npeak memory of a call beyond its arguments, MiB")
        say(f"  {'':{width}}" + "".join(f" {name:>18}" for name in columns))
        rows = []
        for workload in workloads:
            if not run.deadline.left():
                say(f"  {workload!s:{width}} no time left")
                continue
            found: dict[str, int | str] = {}
            for name in names:
                try:
                    found[name] = peak_bytes(self.variants[name], workload, self.small(workload), options)
                except Skip as reason:
                    found[name] = str(reason)
                except torch.OutOfMemoryError:
                    found[name] = "out of memory"
            found |= {name: of(workload, options.threads) for name, of in stated.items()}
            texts = [f"{b / MIB:.1f}" if isinstance(b := found[name], int) else "skipped" for name in columns]
            say(f"  {workload!s:{width}}" + "".join(f" {text:>18}" for text in texts))
            row: dict[str, object] = {"workload": str(workload), "bytes": found}
            if self.judge:
                row["target"] = self.judge(found)
                say(verdict_line(row["target"]))
            rows.append(row)
        return rows
