"""What the methods share that compare embeddings: Prototypical, Matching, Relation and Siamese networks."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_instance
from metafast.data import Episodes

from .method import Method


class MetricLearner(Method):
    """A few-shot learner that embeds all examples alike, and then compares the queries with the support.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        check_instance(nn.Module, backbone=backbone)
        self.backbone = backbone

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """support [T, S, D] and query [T, Q, D], through the backbone together: batch norm sees both."""
        images = torch.cat([episodes.support, episodes.query], dim=1)  # [T, S + Q, ...]
        embeddings = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        support, query = embeddings.split([episodes.support.shape[1], episodes.query.shape[1]], dim=1)
        return support, query

    @abstractmethod
    def compare(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """The loss of embedded episodes: support [T, S, D], query [T, Q, D], labels and ``ways`` as in
        `Episodes`."""

    @abstractmethod
    def classify(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """log p(class | query) of embedded episodes: [T, Q, N]."""

    def loss(self, episodes: Episodes) -> Tensor:
        """What training minimises, over all episodes: a scalar."""
        support, query = self.embed(episodes)
        return self.compare(
            support,
            episodes.support_labels,
            query,
            episodes.query_labels,
            episodes.num_classes,
            episodes.ways,
        )

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query): [T, Q, N]."""
        support, query = self.embed(episodes)
        return self.classify(support, episodes.support_labels, query, episodes.num_classes, episodes.ways)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is true, NaN where it is nowhere: of ``values[mask]``, whose size
    the host would wait for."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()
