"""First-order MAML."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from metafast.data import Episodes

from .maml import MAML
from .method import Reported


class FOMAML(MAML):
    """First-order MAML (Finn et al. 2017, section 5.2): the inner gradients count as constants."""

    reported: ClassVar[Reported] = {}  # the paper has none for this network

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean query loss after adaptation, its gradient that at the adapted weights: a scalar."""
        return self.query_loss(episodes, self.steps, first_order=True)
