"""How optimizers fare on many problems at once: the learned one, and its rivals at their best rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from metafast.data import Optimizees
from metafast.methods import LearnedOptimizer
from metafast.optim import LSTMOptimizer
from metafast.optim.coordinatewise_lstm import CoordinatewiseLSTM

Make = Callable[[Sequence[Tensor]], Optimizer]
"""An optimizer of the given parameters."""

RATES = tuple(10 ** (-4 + exponent / 4) for exponent in range(21))
"""The learning rates that are tried: 1e-4 to 10, four to a factor of ten."""

# All else is torch's default.
RIVALS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "SGD": ({"kind": SGD},),
    "RMSprop": ({"kind": RMSprop},),
    "Adam": ({"kind": Adam},),
    "NAG": tuple({"kind": SGD, "nesterov": True, "momentum": momentum} for momentum in (0.5, 0.9, 0.99)),
}
"""The optimizers that a learned one is compared with, and the settings besides the rate that are tried."""


def final_loss(method: LearnedOptimizer, problems: Optimizees) -> tuple[str, float]:
    """The mean objective after the last step, with its name: what a training of ``method`` logs."""
    return "final_loss", float(final_objective([problems], learned(method.cell)).mean())


def learned(cell: CoordinatewiseLSTM) -> Make:
    """The learned optimizer, to be tried like its rivals."""
    return partial(LSTMOptimizer, cell=cell)


@dataclass(frozen=True, eq=False)
class Tuned:
    """An optimizer at the best of its settings.

    Attributes:
        settings: its arguments.
        curves: what :func:`learning_curves` gives for it.
    """

    settings: Mapping[str, Any]
    curves: Tensor


def learning_curves(batches: Sequence[Optimizees], make: Make) -> Tensor:
    """The objective of every problem before and after each step: [steps + 1, T], T of all batches.

    The problems of a batch are optimised together, as parts of the same tensors: the optimizers here treat
    every coordinate by itself.
    """
    return torch.cat([_optimise(problems, make, whole=True) for problems in batches], 1)


def final_objective(batches: Sequence[Optimizees], make: Make) -> Tensor:
    """The last row of :func:`learning_curves`, for less work: [T]."""
    return torch.cat([_optimise(problems, make, whole=False)[0] for problems in batches])


def tune(batches: Sequence[Optimizees], name: str) -> Tuned:
    """A rival with the settings and the rate of :data:`RATES` that give the lowest mean final objective.

    Found on these very problems, which favours the rival.
    """
    best, chosen = float("inf"), None
    for settings in RIVALS[name]:
        for lr in RATES:
            given = {**settings, "lr": lr}
            objective = float(final_objective(batches, _rival(given)).mean())
            if objective < best:  # false where it diverged
                best, chosen = objective, given
    if chosen is None:
        raise ValueError(f"rivals: {name} diverges with every rate from {RATES[0]} to {RATES[-1]}")
    described = {key: value for key, value in chosen.items() if key not in ("kind", "nesterov")}
    return Tuned(described, learning_curves(batches, _rival(chosen)))


def _rival(settings: Mapping[str, Any]) -> Make:
    return partial(settings["kind"], **{key: value for key, value in settings.items() if key != "kind"})


def _optimise(problems: Optimizees, make: Make, *, whole: bool) -> Tensor:
    """The objectives before and after each step, or only after the last: [rows, T]."""
    params = [tensor.clone().requires_grad_() for tensor in problems.start]
    optimizer = make(params)
    rows = []
    for step in range(problems.steps + 1):
        if whole or step == problems.steps:
            with torch.no_grad():
                rows.append(problems.objective(params))
        if step < problems.steps:
            optimizer.zero_grad()
            problems.losses(params, step).sum().backward()
            optimizer.step()
    return torch.stack(rows)
