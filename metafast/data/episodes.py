"""A batch of few-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What kind of task a network is built for.

    Attributes:
        input_shape: of an example, () for a number.
        outputs: N classes to tell apart, or O numbers to predict.
        regression: whether the labels are numbers (float) rather than classes (int64).
    """

    input_shape: tuple[int, ...]
    outputs: int
    regression: bool


@dataclass(frozen=True, eq=False)
class Episodes:
    """T few-shot tasks, stacked: each classifies examples, or predicts numbers from them.

    Attributes:
        support: [T, S, ...], the labelled examples a task is learned from.
        support_labels: classes, int64 [T, S], in 0..N-1; in regression the targets, float [T, S, O].
        query: [T, Q, ...], the examples the task is scored on.
        query_labels: int64 [T, Q], in 0..N-1; in regression float [T, Q, O].
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    def __len__(self) -> int:
        """T, the number of tasks."""
        return len(self.query)

    @property
    def regression(self) -> bool:
        """Are the labels numbers rather than classes?"""
        return self.support_labels.is_floating_point()

    @property
    def ways(self) -> int:
        """N, the number of classes in an episode (the largest support label plus one)."""
        if self.regression:
            raise ValueError("ways: a regression has no classes")
        return int(self.support_labels.max()) + 1

    @property
    def problem(self) -> Problem:
        """The kind of task that these are."""
        outputs = self.support_labels.shape[-1] if self.regression else self.ways
        return Problem(tuple(self.support.shape[2:]), outputs, self.regression)

    def take(self, tasks: Tensor | slice) -> Episodes:
        """Some of the tasks: an index [T'] (int64), a mask [T] (bool) or a slice."""
        return Episodes(
            self.support[tasks], self.support_labels[tasks], self.query[tasks], self.query_labels[tasks]
        )

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes with every tensor on ``device``."""
        return Episodes(
            self.support.to(device),
            self.support_labels.to(device),
            self.query.to(device),
            self.query_labels.to(device),
        )
