"""Peak memory of an unroll's forward + backward, beside autograd's.

    python -m bench._learned_optimizer_memory VARIANT KIND COORDINATES STEPS THREADS

prints the bytes that one call takes at its peak, beyond its arguments, in this process.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch

from bench import _learned_optimizer_by_hand as by_hand
from bench import _learned_optimizer_jax as in_jax
from bench import _learned_optimizer_peers as peers
from bench._harness import Skip
from bench._learned_optimizer_workloads import Call, Problem, Workload, metafast_unroll
from bench._memory import MIB, peak_of_process, peak_on_cuda, print_peak

AUTOGRAD: dict[str, Callable[[Problem], Call]] = {
    "nn.LSTMCell": functools.partial(peers.unroll, peers.Cells),
    "nn.LSTM": functools.partial(peers.unroll, peers.Lstm),
    "addmm": functools.partial(peers.unroll, peers.Products),
}
VARIANTS = {"metafast": metafast_unroll, **AUTOGRAD, "by hand": by_hand.unroll, "JAX": in_jax.unroll}
LIMIT = 1 / 10  # of the least that autograd takes


def peak_bytes(variant: str, workload: Workload, device: torch.device, threads: int) -> int:
    if device.type == "cuda":
        return peak_on_cuda(VARIANTS[variant](workload.problem(device)))
    arguments = (variant, workload.kind, workload.coordinates, workload.steps, threads)
    return peak_of_process("bench._learned_optimizer_memory", *arguments)


def memory(options: argparse.Namespace, workloads: list[Workload]) -> list[dict[str, object]]:
    """A row for each workload, with the verdict on its target."""
    names = [n for n in VARIANTS if options.device.type == "cpu" or n != "JAX"]  # which has its own allocator
    width = max(len(str(w)) for w in workloads)
    print("\npeak memory of a call beyond its arguments, MiB")
    print(f"  {'':{width}}" + "".join(f" {name:>12}" for name in names))
    rows = []
    for workload in workloads:
        row: dict[str, object] = {"workload": str(workload)}
        for name in names:
            try:
                row[name] = peak_bytes(name, workload, options.device, options.threads)
            except Skip as reason:
                row[name] = str(reason)
        texts = [f"{b / MIB:.1f}" if isinstance(b := row[name], int) else "skipped" for name in names]
        print(f"  {workload!s:{width}}" + "".join(f" {text:>12}" for text in texts))
        reached = row["metafast"] / min(row[name] for name in AUTOGRAD)
        target = f"at most 1/{1 / LIMIT:g} of autograd's memory"
        text = f"1/{1 / reached:.1f}"
        row["target"] = {"target": target, "reached": text, "value": reached, "met": reached <= LIMIT}
        print(f"  {'met   ' if reached <= LIMIT else 'MISSED'} {target}: {text}", flush=True)
        rows.append(row)
    return rows


def main(arguments: list[str]) -> None:
    variant, kind = arguments[:2]
    coordinates, steps, threads = map(int, arguments[2:])

    def build() -> Callable[[], object]:
        make = VARIANTS[variant]
        make(Workload(kind, 64, steps=1).problem(torch.device("cpu")))()
        call = make(Workload(kind, coordinates, steps).problem(torch.device("cpu")))
        if variant == "JAX":
            call()  # compiles
        return call

    print_peak(threads, build)


if __name__ == "__main__":
    main(sys.argv[1:])
