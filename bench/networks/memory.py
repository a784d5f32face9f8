"""The peak memory of a meta-step of a network, with more tasks and more steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.common.cases import Skip
from bench.common.memory import MemoryTable
from bench.networks.peers import by_hand, in_jax, libraries, pytorch
from bench.networks.workloads import NETWORKS, Problem, ours


@dataclass(frozen=True)
class Workload:
    network: str
    tasks: int
    steps: int

    def problem(self, device: torch.device) -> Problem:
        (network,) = (network for network in NETWORKS if network.name == self.network)
        return Problem(network, self.tasks, self.steps, device)

    def __str__(self) -> str:
        return f"{self.network}, T={self.tasks}, K={self.steps}"


def _workloads(device: torch.device, quick: bool) -> Sequence[Workload]:
    if quick:
        return [Workload("GRU 8-32", 2, 1)]
    sizes = {
        "Conv4-64": [(4, 1), (4, 5), (16, 5), (32, 1)],
        "GRU 8-32": [(4, 1), (4, 5), (32, 1)],
        "ResNet-12, narrow": [(4, 1), (4, 5)],
    }
    return [Workload(name, *size) for name, of_network in sizes.items() for size in of_network]


def _transforms(problem: Problem) -> Callable[[], object]:
    if problem.name.startswith("GRU"):
        raise Skip("vmap has no rule for a GRU")
    return pytorch.transforms(problem)


MEMORY = MemoryTable(
    {
        "metafast": functools.partial(ours, path=None),  # of Conv4 fused
        "torch.func path": functools.partial(ours, path="torch.func"),
        "loop path": functools.partial(ours, path="loop"),
        "loop, checkpoints": functools.partial(ours, path="loop", checkpoint_steps=True),
        "plain loop": pytorch.loop,
        "torch.func": _transforms,
        "unfold and bmm": by_hand.unfold,
        "JAX": in_jax.vmap,
        "learn2learn": libraries.learn2learn,
    },
    _workloads,
    small=lambda workload: Workload(workload.network, 1, 1),
)
