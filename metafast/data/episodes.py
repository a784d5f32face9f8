"""A batch of few-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """T few-shot classification tasks, stacked.

    Attributes:
        support: [T, S, ...], the labelled examples a task is learned from.
        support_labels: int64 [T, S], in 0..N-1.
        query: [T, Q, ...], the examples the task is scored on.
        query_labels: int64 [T, Q], in 0..N-1.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    @property
    def ways(self) -> int:
        """N, the number of classes in an episode (the largest support label plus one)."""
        return int(self.support_labels.max()) + 1

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes with every tensor on ``device``."""
        return Episodes(
            self.support.to(device),
            self.support_labels.to(device),
            self.query.to(device),
            self.query_labels.to(device),
        )
