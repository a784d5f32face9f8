"""The parameters and the buffers of tasks, stacked or one task's after the other's."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = tuple[Tensors, Tensors]  # parameters that adapt, and buffers, by their names


class States:
    """Those of T tasks. The paths work on one of two forms; the other is made when somebody asks for it, and
    kept: so with its graph, whoever asks first."""

    def __init__(self, tasks: int, stacked: State | None = None, each: list[State] | None = None) -> None:
        """
        Args:
            stacked: Tensors [T, ...].
            each: One for each task.
        """
        self.tasks = tasks
        self._stacked = stacked
        self._each = each

    @classmethod
    def shared(cls, params: Tensors, buffers: Tensors, tasks: int) -> States:
        """The same for all tasks."""
        expanded = tuple(
            {name: tensor.expand(tasks, *tensor.shape) for name, tensor in group.items()}
            for group in (params, buffers)
        )
        return cls(tasks, expanded, [(params, buffers)] * tasks)

    @property
    def names(self) -> list[str]:
        """Of the parameters that adapt."""
        return list((self._stacked or self._each[0])[0])

    def stacked(self) -> State:
        if self._stacked is None:
            with torch.enable_grad():
                params, buffers = (
                    {name: torch.stack([group[name] for group in groups]) for name in groups[0]}
                    for groups in zip(*self._each, strict=True)
                )
            self._stacked = params, buffers
        return self._stacked

    def each(self) -> list[State]:
        if self._each is None:
            with torch.enable_grad():
                self._each = list(zip(*(_unbound(group, self.tasks) for group in self._stacked), strict=True))
        return self._each


def _unbound(tensors: Tensors, tasks: int) -> list[Tensors]:
    if not tensors:
        return [{}] * tasks
    columns = zip(*(tensor.unbind() for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, column, strict=True)) for column in columns]
