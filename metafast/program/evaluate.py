"""How well a method does over many episodes, with its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast.data import Episodes
from metafast.methods import Method

_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and the half-width of its 95 % confidence interval.

    As a string with a format of its numbers: ``f"{result:.2%}"`` is ``75.00 ± 49.00 %``.
    """

    mean: float
    half_width: float

    def __format__(self, spec: str) -> str:
        if spec.endswith("%"):
            return f"{100 * self.mean:{spec[:-1]}f} ± {100 * self.half_width:{spec[:-1]}f} %"
        return f"{self.mean:{spec}} ± {self.half_width:{spec}}"


def estimate(values: Tensor) -> Estimate:
    """Mean and 95 % interval of one value per episode, [T], T >= 2: 1.96 standard errors either side."""
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"values: expected [T], T >= 2, got shape {tuple(values.shape)}")
    values = values.double()
    return Estimate(float(values.mean()), _Z95 * float(values.std()) / len(values) ** 0.5)


def score_name(episodes: Episodes) -> str:
    """What :func:`score` measures: ``"accuracy"``, or in regression ``"mse"``."""
    return "mse" if episodes.regression else "accuracy"


@torch.no_grad()
def score(method: Method, episodes: Episodes, predict: Callable[[Episodes], Tensor] | None = None) -> Tensor:
    """Each episode's share of queries classified right, or in regression its mean squared error: [T].

    In evaluation mode, each query by itself.

    Args:
        predict: of ``method``, with arguments of its own; default: ``method.predict``.
    """
    training = method.training
    method.eval()
    try:
        predicted = (predict or method.predict)(episodes)
    finally:
        method.train(training)
    labels = episodes.query_labels
    if episodes.regression:
        return (predicted - labels).square().flatten(1).mean(1)
    valid = labels >= 0  # -100: ignored
    return (predicted.argmax(-1) == labels).sum(-1) / valid.sum(-1)


def mean_score(method: Method, episodes: Episodes) -> tuple[str, float]:
    """The name and the mean of :func:`score` over a batch."""
    return score_name(episodes), float(score(method, episodes).mean())


def evaluate(
    method: Method, batches: Iterable[Episodes], predict: Callable[[Episodes], Tensor] | None = None
) -> Estimate:
    """The mean score over all episodes of all batches."""
    return estimate(torch.cat([score(method, episodes, predict) for episodes in batches]))


@dataclass(frozen=True, eq=False)
class ErrorRates:
    """How often pairs are told wrong, for every threshold of their score.

    Attributes:
        thresholds: [B], rising.
        false_accepts: [B], the share of different pairs that score as much or more.
        false_rejects: [B], the share of same pairs that score less.
    """

    thresholds: Tensor
    false_accepts: Tensor
    false_rejects: Tensor

    @property
    def equal(self) -> tuple[float, float]:
        """The threshold at which both shares are (most nearly) the same, and their mean there: the EER."""
        index = int((self.false_accepts - self.false_rejects).abs().argmin())
        return float(self.thresholds[index]), float(self.false_accepts[index] + self.false_rejects[index]) / 2

    def at(self, threshold: float) -> tuple[float, float]:
        """The shares of false accepts and of false rejects at a threshold."""
        index = min(int(torch.searchsorted(self.thresholds, threshold)), len(self.thresholds) - 1)
        return float(self.false_accepts[index]), float(self.false_rejects[index])


def error_rates(same: Tensor, different: Tensor) -> ErrorRates:
    """Of the scores of same pairs [A] and different ones [B]; a pair counts as same from a threshold on."""
    same, different = same.sort().values, different.sort().values
    thresholds = torch.cat([same, different]).unique()
    accepts = 1 - torch.searchsorted(different, thresholds) / len(different)
    return ErrorRates(thresholds, accepts, torch.searchsorted(same, thresholds) / len(same))
