"""A batch of few-shot tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        ways: int64 [T], how many classes each task has, the first of the N; default: all have N. Tasks with
            fewer classes or examples than others are filled up with examples that are labelled -100. No
            method predicts a class that a task does not have.
        classes: N, where whoever drew the episodes knows it; default: the largest support label plus one,
            which the host then waits for where the labels are on a GPU.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    ways: Tensor | None = None
    classes: int | None = None

    def __len__(self) -> int:
        """T, the number of tasks."""
        return len(self.query)

    @property
    def regression(self) -> bool:
        """Are the labels numbers rather than classes?"""
        return self.support_labels.is_floating_point()

    @property
    def num_classes(self) -> int:
        """N, the number of classes in an episode."""
        if self.regression:
            raise ValueError("num_classes: a regression has no classes")
        return int(self.support_labels.max()) + 1 if self.classes is None else self.classes

    @property
    def problem(self) -> Problem:
        """The kind of task that these are."""
        outputs = self.support_labels.shape[-1] if self.regression else self.num_classes
        return Problem(tuple(self.support.shape[2:]), outputs, self.regression)

    def take(self, tasks: Tensor | slice) -> Episodes:
        """Some of the tasks: an index [T'] (int64), a mask [T] (bool) or a slice."""
        return self._each(lambda tensor: tensor[tasks])

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes with every tensor on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})
