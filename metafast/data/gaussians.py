"""Classes that are Gaussian clouds of one shape: few-shot tasks whose best answer is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .episodes import Episodes
from .sampling import check_sizes, open_unit, random_bits


class GaussianSampler:
    """Draws ``tasks`` episodes of ``ways`` classes, each a normal distribution around a centre of its own.

    All classes of all episodes scatter alike, a hundred times as much along some directions as along others:
    an example is centre + A e, e ~ N(0, 1). The directions are what there is to learn from other classes (the
    within-class variation that Wang et al. 2018 mean to share); with one example a class, a distance that
    does not know them is lost in the scatter.

    As with :class:`EpisodeSampler`, ``batch(step)`` is a pure function of (seed, step).

    Args:
        ways, shots, queries, tasks: as for :class:`EpisodeSampler`.
        features: D, of an example.
        wide: how many of the D directions have the wide scatter.
        scatter: standard deviations along the wide and the narrow directions; centres have 1 along all.
        seed: of the episodes. The directions are the same for every seed: training's are the test's.
        device: where the episodes are drawn.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        features: int = 16,
        wide: int = 8,
        scatter: tuple[float, float] = (4.0, 0.4),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_sizes(ways=ways, shots=shots, queries=queries, tasks=tasks, features=features)
        if not 0 <= wide <= features:
            raise ValueError(f"wide: expected 0 to features = {features}, got {wide}")
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.tasks = tasks
        self.features = features
        self.seed = seed
        self.device = torch.device(device)
        spread = torch.full((features,), scatter[1], dtype=torch.float64)
        spread[:wide] = scatter[0]
        basis, _ = torch.linalg.qr(_normal(random_bits(0, 0, (features, features, 2), "cpu")).double())
        # Rows: the directions, times their scatter.
        self.shape = (spread.unsqueeze(1) * basis).float().to(self.device)

    def batch(self, step: int) -> Episodes:
        """The episodes of ``step`` >= 0: support [T, N shots, D], query [T, N queries, D], class by class."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        draws = 1 + self.shots + self.queries
        sizes = (self.tasks, self.ways, draws, self.features, 2)
        drawn = _normal(random_bits(self.seed, step, sizes, self.device))  # [T, N, 1 + shots + queries, D]
        examples = drawn[:, :, :1] + drawn[:, :, 1:] @ self.shape
        support, query = examples.split([self.shots, self.queries], 2)
        return Episodes(
            support.flatten(1, 2),
            self._labels(self.shots),
            query.flatten(1, 2),
            self._labels(self.queries),
            classes=self.ways,
        )

    def _labels(self, per_class: int) -> Tensor:
        """[T, N*per_class]: 0 .. N-1, each ``per_class`` times."""
        return torch.arange(self.ways, device=self.device).repeat_interleave(per_class).repeat(self.tasks, 1)


def _normal(bits: Tensor) -> Tensor:
    """int64 [..., 2] -> float32 [...], by Box and Muller 1958."""
    radius, angle = open_unit(bits).unbind(-1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
