"""The convolutional family against a plain loop over tasks, in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from convolutional_problems import CASES, Case, assert_near, forward, gradients, make, plain
from torch import Tensor

from metafast import reference


def _results(module: ModuleType, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The adapted parameters, the statistics, and the gradients of all that can have one."""
    problem = make(case, dtype)
    params, statistics = module.conv_inner_sgd(
        problem.network, problem.params, problem.x, problem.y, lr=problem.lr, **problem.options
    )
    return [*params, statistics, *gradients(params, problem.leaves)]


def _expected(case: Case) -> list[Tensor]:
    problem = make(case, torch.float64)
    params, statistics = plain(problem)
    channels = sum(w for b, w in zip(case.network, case.widths, strict=True) if b.norm)
    statistics = statistics.reshape(case.steps, 2, case.tasks, channels)
    return [*params, statistics, *gradients(params, problem.leaves)]


@pytest.mark.parametrize("name", CASES)
def test_conv_inner_sgd(name: str) -> None:
    case = CASES[name]
    assert_near(_results(reference, case, torch.float64), _expected(case), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_conv_forward(name: str) -> None:
    case = CASES[name]
    problem = make(case, torch.float64)
    leaves = [*problem.params, problem.x]
    out = reference.conv_forward(problem.network, problem.params, problem.x)
    of_tasks = [
        forward(case.network, [p[t] if case.per_task else p for p in problem.params], x, [])
        for t, x in enumerate(problem.x)
    ]
    expected = torch.stack(of_tasks)
    assert_near([out, *gradients([out], leaves)], [expected, *gradients([expected], leaves)], torch.float64)
