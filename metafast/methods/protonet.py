"""Prototypical Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_choice, check_instance
from metafast.data import Episodes, Problem
from metafast.ops.pairwise import METRICS, prototypical_log_probs, prototypical_loss
from metafast.settings import Count, Settings, setting

from .conv4 import conv4
from .method import Method, Recipes


@dataclass(frozen=True, kw_only=True)
class ProtoNetSettings(Settings):
    metric: Literal["sqeuclidean", "euclidean", "cosine", "cityblock"] = setting(
        "sqeuclidean", "distance of a query to a prototype"
    )
    hidden: Count = setting(64, "channels of Conv4")


class ProtoNet(Method):
    """Prototypical Networks (Snell, Swersky, Zemel 2017): a class is the mean of its support embeddings.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        metric: distance of a query to a prototype, as in :func:`metafast.pairwise_distance`.
    """

    paper = "Snell, Swersky, Zemel 2017"
    Settings = ProtoNetSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "ways": 60,
            "steps": 600,
            "lr": 2e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(self, backbone: nn.Module, *, metric: str = "sqeuclidean") -> None:
        super().__init__()
        check_instance(nn.Module, backbone=backbone)
        check_choice(METRICS, metric=metric)
        self.backbone = backbone
        self.metric = metric

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """support [T, S, D] and query [T, Q, D], through the backbone together: batch norm sees both."""
        images = torch.cat([episodes.support, episodes.query], dim=1)  # [T, S + Q, ...]
        embeddings = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        support, query = embeddings.split([episodes.support.shape[1], episodes.query.shape[1]], dim=1)
        return support, query

    def loss(self, episodes: Episodes) -> Tensor:
        """Mean negative log-likelihood of the query labels: a scalar (equation 2 and algorithm 1)."""
        support, query = self.embed(episodes)
        return prototypical_loss(
            support,
            episodes.support_labels,
            query,
            episodes.query_labels,
            episodes.ways,
            metric=self.metric,
        )

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query): [T, Q, N]."""
        support, query = self.embed(episodes)
        return prototypical_log_probs(
            support, episodes.support_labels, query, episodes.ways, metric=self.metric
        )

    @classmethod
    def from_settings(cls, settings: ProtoNetSettings, problem: Problem) -> ProtoNet:
        channels, height, width = problem.input_shape
        if min(height, width) < 16:
            raise ValueError(f"image_size: expected at least 16, which Conv4 halves four times, got {height}")
        return cls(conv4(channels, settings.hidden), metric=settings.metric)
