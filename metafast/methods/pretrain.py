"""The baseline of meta-learning: one network for all tasks, then fine-tuned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from metafast.data import Episodes

from .adaptation import SINE, Adaptation
from .method import Recipes


class Pretrain(Adaptation):
    """Pre-training: one network learns the examples of all tasks together, and is fine-tuned on a new task.

    In training batch norm, where the network has any, goes by the examples of all tasks; in fine-tuning by
    the task, as in :class:`Adaptation`.

    For regression: classes are numbered anew in every episode, which leaves nothing to learn without one.
    """

    paper = "baseline of Finn, Abbeel, Levine 2017"
    recipes: ClassVar[Recipes] = {"sine": SINE}

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean loss of the network as it is over all examples: a scalar."""
        x = torch.cat([episodes.support, episodes.query], dim=1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], dim=1)
        if not self.fused:
            out = self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.losses(out, labels).mean()
        return self.query_loss(Episodes(x, labels, x, labels), 0)
