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

    For regression: classes are numbered anew in every episode, which leaves nothing to learn without one.
    """

    paper = "baseline of Finn, Abbeel, Levine 2017"
    recipes: ClassVar[Recipes] = {"sine": SINE}

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean loss of the network as it is over all examples: a scalar."""
        x = torch.cat([episodes.support, episodes.query], dim=1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], dim=1)
        return self.query_loss(Episodes(x, labels, x, labels), 0)
