"""Prototypical Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from metafast._dispatch.arguments import check_choice
from metafast.data import Problem
from metafast.ops.pairwise import METRICS, prototypical_log_probs, prototypical_loss
from metafast.settings import setting

from .backbones import BackboneSettings
from .method import Recipes, Reported
from .metric import MetricLearner


@dataclass(frozen=True, kw_only=True)
class ProtoNetSettings(BackboneSettings):
    metric: Literal["sqeuclidean", "euclidean", "cosine", "cityblock"] = setting(
        "sqeuclidean", "distance of a query to a prototype"
    )


class ProtoNet(MetricLearner):
    """Prototypical Networks (Snell, Swersky, Zemel 2017): a class is the mean of its support embeddings.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        metric: distance of a query to a prototype, as in :func:`metafast.pairwise_distance`.
    """

    paper = "Snell, Swersky, Zemel 2017"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.988,
        ("omniglot", 5, 5): 0.997,
        ("omniglot", 20, 1): 0.96,
        ("omniglot", 20, 5): 0.989,
    }
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
        super().__init__(backbone)
        check_choice(METRICS, metric=metric)
        self.metric = metric

    def compare(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood of the query labels: a scalar (equation 2 and algorithm 1)."""
        return prototypical_loss(
            support, support_labels, query, query_labels, num_classes, metric=self.metric, ways=ways
        )

    def classify(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        return prototypical_log_probs(
            support, support_labels, query, num_classes, metric=self.metric, ways=ways
        )

    @classmethod
    def from_settings(cls, settings: ProtoNetSettings, problem: Problem) -> ProtoNet:
        backbone, _ = settings.build(problem)
        return cls(backbone, metric=settings.metric)
