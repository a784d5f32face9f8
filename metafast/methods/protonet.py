"""Prototypical Networks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_choice, check_instance
from metafast.data import Episodes, Problem
from metafast.ops.pairwise import METRICS, prototypical_log_probs, prototypical_loss
from metafast.program.options import COUNT

from .conv4 import conv4
from .method import Method, Recipes


class ProtoNet(Method):
    """Prototypical Networks (Snell, Swersky, Zemel 2017): a class is the mean of its support embeddings.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        metric: distance of a query to a prototype, as in :func:`metafast.pairwise_distance`.
    """

    recipes: ClassVar[Recipes] = {
        "images": {
            "center": False,
            "ways": 60,
            "shots": 1,
            "queries": 5,
            "tasks": 1,
            "steps": 600,
            "optimizer": "adam",
            "lr": 2e-3,
            "schedule": "cosine",
            "precision": "auto",
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
    def add_options(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--metric",
            default="sqeuclidean",
            choices=("sqeuclidean", "euclidean", "cosine", "cityblock"),
            help="distance of a query to a prototype (default: %(default)s)",
        )
        parser.add_argument(
            "--hidden", type=COUNT, default=64, metavar="H", help="channels of Conv4 (default: %(default)s)"
        )

    @classmethod
    def from_options(cls, options: Namespace, problem: Problem) -> ProtoNet:
        channels, height, width = problem.input_shape
        if min(height, width) < 16:
            raise ValueError(f"image_size: expected at least 16, which Conv4 halves four times, got {height}")
        return cls(conv4(channels, options.hidden), metric=options.metric)
