"""Accuracy over many episodes, with its confidence interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast.data import Episodes
from metafast.methods import Method

_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and the half-width of its 95 % confidence interval, both in 0..1."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.half_width:.2f} %"


def estimate(values: Tensor) -> Estimate:
    """Mean and 95 % interval of one value per episode, [T], T >= 2: 1.96 standard errors either side."""
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"values: expected [T], T >= 2, got shape {tuple(values.shape)}")
    values = values.double()
    return Estimate(float(values.mean()), _Z95 * float(values.std()) / len(values) ** 0.5)


@torch.no_grad()
def accuracy(method: Method, episodes: Episodes) -> Tensor:
    """Share of queries classified right in each episode, [T]; in evaluation mode, each query by itself."""
    training = method.training
    method.eval()
    predicted = method.log_probs(episodes).argmax(-1)
    method.train(training)
    labels = episodes.query_labels  # -100: ignored
    return (predicted == labels).sum(-1) / (labels >= 0).sum(-1)


def evaluate(method: Method, batches: Iterable[Episodes]) -> Estimate:
    """Accuracy over all episodes of all batches."""
    return estimate(torch.cat([accuracy(method, episodes) for episodes in batches]))
