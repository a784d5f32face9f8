"""Draws batches of few-shot episodes by tensor indexing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .classes import ImageClasses
from .episodes import Episodes
from .sampling import check_sizes, random_bits, sample_without_replacement

_BLOCK = 64  # steps that are drawn together, if they are small: a step alone would cost 60 calls of torch
_PAIRS = 2**18  # of drawn numbers, which drawing compares in one call


class EpisodeSampler:
    """Draws ``tasks`` episodes of ``ways`` classes at a time from ``classes``.

    ``batch(step)`` is a pure function of (seed, step), the same bits every time and on every device, so a run
    resumes by continuing at its step. Task t of a batch does not depend on T. On a GPU nothing is copied to
    it or waited for.

    Within an episode the classes are distinct, the examples of a class are distinct, and so support and query
    are disjoint; every such episode is equally likely. Examples come class by class, as is the custom: the
    support labels of a task are ``shots`` times 0, then ``shots`` times 1, and so on; the same for the query.

    Args:
        classes: what to draw from.
        ways: N, classes per episode.
        shots: support examples per class.
        queries: query examples per class.
        tasks: T, episodes per batch.
        seed: any int; different seeds give independent streams of episodes.
        device: where the images are kept and the episodes drawn; default: where ``classes`` is.

    Raises:
        ValueError: a size is out of range, there are fewer classes than ``ways``, or a class has fewer than
            ``shots + queries`` examples.
    """

    def __init__(
        self,
        classes: ImageClasses,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes(ways=ways, shots=shots, queries=queries, tasks=tasks)
        if ways > len(classes):
            raise ValueError(f"ways: expected at most {len(classes)}, the number of classes, got {ways}")
        counts = classes.counts
        fewest = classes.images.shape[1] if counts is None else int(counts.min())
        if shots + queries > fewest:
            name = classes.names[0 if counts is None else int(counts.argmin())]
            raise ValueError(
                f"shots + queries: expected at most {fewest}, the number of examples of class {name!r}, "
                f"got {shots} + {queries}"
            )
        self.classes = classes if device is None else classes.to(device)
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.tasks = tasks
        self.seed = seed
        pairs = tasks * ways * (ways + (shots + queries) ** 2)  # which drawing a step compares
        self._length = max(1, min(_BLOCK, _PAIRS // pairs))
        self._block = -1
        self._rows = torch.empty(0)

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any], **sizes: Any) -> EpisodeSampler:
        """Draws from a torch dataset of pairs (image, target), such as torchvision's.

        Args:
            dataset: as for :meth:`ImageClasses.from_dataset`; all of it is read, once.
            sizes: ``ways``, ``shots``, ``queries``, ``tasks``, ``seed`` and ``device``, as above.

        Example::

            cifar = torchvision.datasets.CIFAR100("data", transform=torchvision.transforms.ToTensor())
            sampler = EpisodeSampler.from_dataset(cifar, ways=5, shots=1, queries=15, tasks=4)
        """
        return cls(ImageClasses.from_dataset(dataset), **sizes)

    def batch(self, step: int) -> Episodes:
        """The episodes of ``step`` >= 0: support [T, N*shots, ch, H, W], query [T, N*queries, ch, H, W].

        The tensors are the caller's own: what is done to them changes no other batch.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        block, index = divmod(step, self._length)
        if block != self._block:
            self._rows = self._draw(block)
            self._block = block
        support, query = self._rows[index].split([self.shots, self.queries], -1)
        return Episodes(
            self._take(support),
            self._labels(self.shots),
            self._take(query),
            self._labels(self.queries),
            classes=self.ways,
        )

    def _draw(self, block: int) -> Tensor:
        """Of each step of a block the rows of the images as [C*M, ...]: [block, T, N, shots + queries]."""
        images, counts = self.classes.images, self.classes.counts
        steps = torch.arange(block * self._length, (block + 1) * self._length, device=images.device)
        draws = self.shots + self.queries
        bits = random_bits(self.seed, steps, (self.tasks, self.ways * (1 + draws)), images.device)
        chosen = sample_without_replacement(bits[..., : self.ways], len(self.classes))  # [block, T, N]
        population = images.shape[1] if counts is None else counts[chosen].unsqueeze(-1)
        bits = bits[..., self.ways :].unflatten(-1, (self.ways, draws))
        return chosen.unsqueeze(-1) * images.shape[1] + sample_without_replacement(bits, population)

    def _take(self, rows: Tensor) -> Tensor:
        """[T, N, K] rows of the flattened images -> [T, N*K, ch, H, W]."""
        images = self.classes.images.flatten(0, 1)
        return images.index_select(0, rows.flatten()).unflatten(0, (self.tasks, -1))

    def _labels(self, per_class: int) -> Tensor:
        """[T, N*per_class]: 0 .. N-1, each ``per_class`` times."""
        labels = torch.arange(self.ways, device=self.classes.images.device).repeat_interleave(per_class)
        return labels.repeat(self.tasks, 1)
