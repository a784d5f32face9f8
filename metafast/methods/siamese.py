"""Siamese networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count
from metafast.data import Problem
from metafast.ops.pairwise import pairwise_distance

from .backbones import BackboneSettings
from .method import Recipes
from .metric import MetricLearner, masked_mean

_POOLS = 3  # of conv4: a distance feature by feature tells more by 576 features than by 64


@dataclass(frozen=True, kw_only=True)
class SiameseSettings(BackboneSettings):
    pass


class Siamese(MetricLearner):
    """Siamese networks (Koch, Zemel, Salakhutdinov 2015): are two examples of one class?

    Their embeddings are compared feature by feature: p(same) = sigmoid(bias - sum_d w_d abs(x_d - y_d)), with
    learned weights. A query is of the class of its best match in the support.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        features: D.
    """

    paper = "Koch, Zemel, Salakhutdinov 2015"
    Settings = SiameseSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "ways": 40,
            "queries": 2,
            "steps": 1500,
            "lr": 5e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__(backbone)
        check_count(1, features=features)
        # Near the middle of the sigmoid for features around 1: half of them differ.
        self.weight = nn.Parameter(torch.full((features,), 2 / features))
        self.bias = nn.Parameter(torch.ones(()))

    def logits(self, x: Tensor, y: Tensor) -> Tensor:
        """How much each x looks like each y, embedded: [..., Q, D], [..., S, D] -> log odds [..., Q, S]."""
        return self.bias - pairwise_distance(x, y, "cityblock", weight=self.weight)

    def verify(self, x: Tensor, y: Tensor) -> Tensor:
        """p(same) of pairs of examples, [B, ...] and [B, ...]: [B]."""
        x, y = self.backbone(torch.cat([x, y])).unsqueeze(1).chunk(2)  # pairs as B episodes of one each
        return self.logits(x, y).sigmoid().flatten()

    def compare(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy over all pairs of a query and a support example.

        Pairs of one class are few, and count as much as all others together, as in the paper's batches.
        """
        same = query_labels.unsqueeze(-1) == support_labels.unsqueeze(-2)  # [T, Q, S]
        known = (query_labels >= 0).unsqueeze(-1) & (support_labels >= 0).unsqueeze(-2)
        losses = F.binary_cross_entropy_with_logits(
            self.logits(query, support), same.to(query.dtype), reduction="none"
        )
        return sum(masked_mean(losses, known & kind) for kind in (same, ~same)) / 2

    def classify(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        logits = self.logits(query, support)  # [T, Q, S]
        classes = torch.arange(num_classes, device=query.device)
        of_class = support_labels.unsqueeze(-2) == classes.unsqueeze(-1)  # [T, N, S]
        matches = logits.unsqueeze(-2).masked_fill(~of_class.unsqueeze(1), -torch.inf)  # [T, Q, N, S]
        return matches.amax(-1).log_softmax(-1)

    @classmethod
    def from_settings(cls, settings: SiameseSettings, problem: Problem) -> Siamese:
        backbone, (features,) = settings.build(problem, pools=_POOLS)
        return cls(backbone, features)
