"""Problems to train a learned optimizer on: T quadratics, or T trainings of a small network, at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .classes import ImageClasses
from .networks import Network
from .sampling import check_sizes, open_unit, random_bits, sample_without_replacement

_DIMENSIONS = 10  # of a quadratic
_STREAMS = ("start", "rows", "scales", "classes")  # of random numbers
_START = 0.01  # standard deviation of the parameters that a quadratic begins from


@dataclass(frozen=True, eq=False)
class Optimization:
    """What a learned optimizer is trained for.

    Attributes:
        steps: of an optimisation.
    """

    steps: int


@dataclass(frozen=True, eq=False)
class Optimizees(ABC):
    """T problems, stacked: parameters to begin from, and a loss of them that changes from step to step.

    Attributes:
        start: the parameters that optimisation begins from, each [T, ...].
        steps: how many steps there are data for; step ``steps`` too has a loss, which is the last.
    """

    start: list[Tensor]
    steps: int

    def __len__(self) -> int:
        """T, the number of problems."""
        return len(self.start[0])

    @property
    def problem(self) -> Optimization:
        """The kind of optimisation that these are."""
        return Optimization(self.steps)

    @abstractmethod
    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        """The loss of each problem on the data of a step, 0 to ``steps``: params each [T, ...] -> [T]."""

    @abstractmethod
    def objective(self, params: Sequence[Tensor]) -> Tensor:
        """What is minimised, without the noise of a step's data: params each [T, ...] -> [T]."""

    @abstractmethod
    def take(self, tasks: Tensor | slice) -> Optimizees:
        """Some of the problems: an index [T'] (int64), a mask [T] (bool) or a slice."""


@dataclass(frozen=True, eq=False)
class Quadratics(Optimizees):
    """f(theta) = |W theta - y|^2, the same in every step (Andrychowicz et al. 2016, section 3.1).

    Attributes:
        matrix: W [T, 10, 10].
        target: y [T, 10].
    """

    matrix: Tensor
    target: Tensor

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        return self.objective(params)

    def objective(self, params: Sequence[Tensor]) -> Tensor:
        product = (self.matrix @ params[0].unsqueeze(-1)).squeeze(-1)
        return (product - self.target).square().sum(-1)

    def take(self, tasks: Tensor | slice) -> Quadratics:
        start = [tensor[tasks] for tensor in self.start]
        return replace(self, start=start, matrix=self.matrix[tasks], target=self.target[tasks])


@dataclass(frozen=True, eq=False)
class Trainings(Optimizees):
    """T trainings of a network from initialisations of their own, each on minibatches of its own.

    Attributes:
        network: which gives the logits.
        images: [N, ...], and labels: int64 [N], of all trainings.
        rows: int64 [steps + 1, T, B], the examples of each minibatch.
    """

    network: Network
    images: Tensor
    labels: Tensor
    rows: Tensor

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        rows = self.rows[step]
        return self._cross_entropy(params, self.images[rows], self.labels[rows])

    def objective(self, params: Sequence[Tensor]) -> Tensor:
        tasks = len(params[0])
        images = self.images.expand(tasks, *self.images.shape)
        return self._cross_entropy(params, images, self.labels.expand(tasks, -1))

    def _cross_entropy(self, params: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(params, images)  # [T, B, N]
        return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").mean(-1)

    def take(self, tasks: Tensor | slice) -> Trainings:
        return replace(self, start=[tensor[tasks] for tensor in self.start], rows=self.rows[:, tasks])


@dataclass(frozen=True, eq=False)
class Scaled(Optimizees):
    """Problems whose coordinates are measured in units of their own: f(c theta), begun at start / c.

    Attributes:
        problems: those of f.
        scales: c, each [T, ...], as the parameters.
    """

    problems: Optimizees
    scales: list[Tensor]

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        return self.problems.losses(self._original(params), step)

    def objective(self, params: Sequence[Tensor]) -> Tensor:
        return self.problems.objective(self._original(params))

    def _original(self, params: Sequence[Tensor]) -> list[Tensor]:
        return [scale * param for scale, param in zip(self.scales, params, strict=True)]

    def take(self, tasks: Tensor | slice) -> Scaled:
        start = [tensor[tasks] for tensor in self.start]
        scales = [tensor[tasks] for tensor in self.scales]
        return replace(self, start=start, problems=self.problems.take(tasks), scales=scales)


class OptimizeeSampler(Protocol):
    """Draws problems; ``batch(step)`` is a pure function of the seed and the step."""

    def batch(self, step: int) -> Optimizees: ...


class QuadraticSampler:
    """Draws ``tasks`` quadratics at a time (Andrychowicz et al. 2016, section 3.1).

    The elements of W and y are standard normal; optimisation begins at normal numbers with standard
    deviation 0.01, as in the authors' code. ``batch(step)`` is a pure function of (seed, step), the same on
    every device.

    Args:
        tasks: T, problems per batch.
        steps: of an optimisation.
        seed: any int; different seeds give independent streams of problems.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(self, *, tasks: int, steps: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        check_sizes(tasks=tasks, steps=steps)
        self.tasks = tasks
        self.steps = steps
        self.seed = seed
        self.device = torch.device(device)

    def batch(self, step: int) -> Quadratics:
        """The problems of ``step`` >= 0, float32."""
        size = _DIMENSIONS
        bits = random_bits(
            _stream(self.seed, "start"), step, (self.tasks, size * size + 2 * size), self.device
        )
        matrix, target, start = _normal(bits).split([size * size, size, size], dim=1)
        return Quadratics([_START * start], self.steps, matrix.unflatten(1, (size, size)), target)


class TrainingSampler:
    """Draws ``tasks`` trainings of a network at a time: initialisations, and a minibatch for every step.

    ``batch(step)`` is a pure function of (seed, step), the same on every device.

    Args:
        network: what is trained.
        classes: whose images it learns to tell apart.
        ways: how many of the classes, drawn anew for every batch and the same in all its trainings; default:
            all.
        batch_size: examples of a minibatch, drawn with replacement.
        tasks, steps, seed: as in :class:`QuadraticSampler`.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        network: Network,
        classes: ImageClasses,
        *,
        tasks: int,
        steps: int,
        ways: int | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        check_sizes(tasks=tasks, steps=steps, batch_size=batch_size)
        if ways is not None and not 1 <= ways <= len(classes):
            raise ValueError(f"ways: expected 1 to {len(classes)}, the number of classes, got {ways}")
        self.network = network
        self.classes = classes
        self.ways = ways
        self._all = _examples(classes.images, classes.counts) if ways is None else None
        self.batch_size = batch_size
        self.tasks = tasks
        self.steps = steps
        self.seed = seed

    def batch(self, step: int) -> Trainings:
        """The trainings of ``step`` >= 0, float32."""
        images, labels = self._all or self._draw(step)
        device = images.device
        sizes = [shape.numel() for shape, _ in self.network.parameters]
        unit = open_unit(random_bits(_stream(self.seed, "start"), step, (self.tasks, sum(sizes)), device))
        start = [
            bound * (2 * flat - 1).unflatten(1, shape)
            for flat, (shape, bound) in zip(unit.split(sizes, dim=1), self.network.parameters, strict=True)
        ]
        drawn = (self.steps + 1, self.tasks, self.batch_size)
        rows = random_bits(_stream(self.seed, "rows"), step, drawn, device) % len(labels)
        return Trainings(start, self.steps, self.network, images, labels, rows)

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        images, counts = self.classes.images, self.classes.counts
        bits = random_bits(_stream(self.seed, "classes"), step, (self.ways,), images.device)
        drawn = sample_without_replacement(bits, len(self.classes))
        return _examples(images[drawn], None if counts is None else counts[drawn])


class ScaledSampler:
    """The problems of a sampler, with coordinates scaled at random (Lv, Jiang, Li 2017, section 4.1).

    Every c is exp(u), u uniform in [-``size``, ``size``]: an optimizer that learns on them must take its
    measure from the gradients, and so does better on problems of other kinds.
    """

    def __init__(self, sampler: OptimizeeSampler, *, size: float, seed: int = 0) -> None:
        if not 0 <= size < math.inf:
            raise ValueError(f"size: expected a number >= 0, got {size}")
        self.sampler = sampler
        self.size = size
        self.seed = seed

    def batch(self, step: int) -> Scaled:
        problems = self.sampler.batch(step)
        sizes = [tensor[0].numel() for tensor in problems.start]
        shape = (len(problems), sum(sizes))
        unit = open_unit(random_bits(_stream(self.seed, "scales"), step, shape, problems.start[0].device))
        flat = (self.size * (2 * unit - 1)).exp().split(sizes, dim=1)
        scales = [part.view_as(tensor) for part, tensor in zip(flat, problems.start, strict=True)]
        start = [tensor / scale for tensor, scale in zip(problems.start, scales, strict=True)]
        return Scaled(start, problems.steps, problems, scales)


def _examples(images: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """All images [N, ...] of classes [C, M, ...] and their labels, int64 [N]."""
    classes, most, device = *images.shape[:2], images.device
    labels = torch.arange(classes, device=device).repeat_interleave(most)
    images = images.flatten(0, 1)
    if counts is None:
        return images, labels
    there = (torch.arange(most, device=device) < counts[:, None]).flatten()
    return images[there], labels[there]


def _stream(seed: int, name: str) -> int:
    """The seed of a stream of its own."""
    return len(_STREAMS) * seed + _STREAMS.index(name)


def _normal(bits: Tensor) -> Tensor:
    """int64 in 0..2^63-1 -> standard normal float32."""
    return torch.special.ndtri(open_unit(bits).double()).float()
