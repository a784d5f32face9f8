"""Peak memory of an unroll's forward + backward, beside autograd's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.common.memory import Build, MemoryTable
from bench.learned_optimizer.cases import workloads
from bench.learned_optimizer.peers import by_hand, in_jax, pytorch
from bench.learned_optimizer.workloads import Workload, metafast_unroll

AUTOGRAD: dict[str, Build] = {
    "nn.LSTMCell": functools.partial(pytorch.unroll, pytorch.Cells),
    "nn.LSTM": functools.partial(pytorch.unroll, pytorch.Lstm),
    "addmm": functools.partial(pytorch.unroll, pytorch.Products),
}
LIMIT = 1 / 10  # of the least that autograd takes


def _workloads(device: torch.device, quick: bool) -> Sequence[Workload]:
    return [workload for workload in workloads(device, quick) if workload.steps is not None]


def _judge(found: Mapping[str, Any]) -> dict[str, object]:
    reached = found["metafast"] / min(found[name] for name in AUTOGRAD)
    return {
        "target": f"at most 1/{1 / LIMIT:g} of autograd's memory",
        "reached": f"1/{1 / reached:.1f}",
        "value": reached,
        "met": reached <= LIMIT,
    }


MEMORY = MemoryTable(
    {"metafast": metafast_unroll, **AUTOGRAD, "by hand": by_hand.unroll, "JAX": in_jax.unroll},
    _workloads,
    small=lambda workload: dataclasses.replace(workload, coordinates=64, steps=1),
    judge=_judge,
)
