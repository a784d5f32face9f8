"""How the inner loop's memory grows with steps and tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.common.memory import MemoryTable
from bench.inner_loop.peers import by_hand, in_jax, pytorch
from bench.inner_loop.workloads import SINE, Workload, metafast_through_autograd
from metafast import _C

# Tasks in the lanes, on AVX-512 half as many: two examples of each.
GROUP = {"baseline": 4, "avx2": 8, "avx512": 8}


def documented_bytes(workload: Workload, threads: int) -> int:
    """As csrc/inner_loop/adaptation.h states it, for second order on the CPU, where tasks fill the lanes.

    Each thread holds K + 4 sets of a group's parameters; each work item of 8 tasks and more, 64 at most,
    leaves a sum of the gradient. Activations of a step, small beside these, are not in it.
    """
    group = GROUP[_C.active_isa()]
    of_threads = min(threads, -(-workload.tasks // group)) * (workload.steps + 4) * group
    items = min(64, -(-workload.tasks // 8))
    return 4 * (of_threads + items) * workload.parameters


def _workloads(device: torch.device, quick: bool) -> Sequence[Workload]:
    sizes = [(32, 5)] if quick else [(256, 1), (256, 5), (256, 20), (32, 5), (2048, 5)]  # tasks, steps
    return [SINE(tasks, steps=steps) for tasks, steps in sizes]


MEMORY = MemoryTable(
    {
        "metafast": metafast_through_autograd,
        "bmm, HVP by hand": by_hand.bmm_by_hand,
        "torch.func": pytorch.torch_func,
        "JAX": in_jax.vmap,
    },
    _workloads,
    small=lambda _: SINE(1, steps=1),
    stated={"documented": documented_bytes},
)
