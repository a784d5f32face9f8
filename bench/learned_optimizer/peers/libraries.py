"""The libraries for learned optimizers."""

from __future__ import annotations

from bench.common.cases import Skip
from bench.learned_optimizer.workloads import Call, Problem


def pylo_step(problem: Problem) -> Call:
    raise Skip(
        "not on the package index, where pylo is another program; and its optimizers are MLPs, not this"
    )
