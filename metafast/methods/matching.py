"""Matching Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count, check_instance
from metafast.data import Problem
from metafast.ops.pairwise import matching_log_probs, matching_loss
from metafast.reference.labels import IGNORED
from metafast.settings import Positive, Whole, setting

from .backbones import BackboneSettings
from .method import Recipes, Reported
from .metric import MetricLearner


class FullContext(nn.Module):
    """Full context embeddings (Vinyals et al. 2016, appendix A.1 and A.2): what an example is embedded as
    depends on the whole support.

    The support goes through a bidirectional LSTM, each query through an LSTM that attends to the support for
    some steps. Both add what they find to the embeddings, which stay D wide.

    Args:
        features: D.
        steps: of the attention LSTM.
    """

    def __init__(self, features: int, *, steps: int = 5) -> None:
        super().__init__()
        check_count(1, features=features)
        check_count(0, steps=steps)
        self.steps = steps
        # Two, as what fills up a task comes last in either direction.
        self.forwards = nn.LSTM(features, features, batch_first=True)
        self.backwards = nn.LSTM(features, features, batch_first=True)
        # Equation 3's LSTM on the query has [h, r] as hidden state: its product with r is an input's.
        self.query = nn.LSTMCell(2 * features, features)

    def forward(self, support: Tensor, query: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """support [T, S, D], query [T, Q, D] -> the same shapes.

        Args:
            known: bool [T, S], the examples of the support that there are, the others fill up a task;
                default: all.
        """
        if known is None:
            known = torch.ones(support.shape[:2], dtype=torch.bool, device=support.device)
        places = torch.arange(support.shape[1], device=support.device)
        support = (
            support
            + _read(self.forwards, support, places.where(known, support.shape[1] + places))
            + _read(self.backwards, support, (-places).where(known, 1 + places))
        )
        inputs = query.flatten(0, 1)
        hidden, cell = inputs, torch.zeros_like(inputs)
        for _ in range(self.steps):
            readout = F.scaled_dot_product_attention(
                hidden.view_as(query), support, support, attn_mask=known.unsqueeze(1), scale=1.0
            )  # [T, Q, D], by the softmax of h.g
            hidden, cell = self.query(torch.cat([inputs, readout.flatten(0, 1)], 1), (hidden, cell))
            hidden = hidden + inputs
        return support, hidden.view_as(query)


def _read(lstm: nn.LSTM, support: Tensor, keys: Tensor) -> Tensor:
    """What the LSTM makes of each example, [T, S, D], reading them by rising keys, [T, S]."""
    order = keys.argsort(1).unsqueeze(-1).expand_as(support)
    hidden, _ = lstm(support.gather(1, order))
    return torch.zeros_like(hidden).scatter(1, order, hidden)


@dataclass(frozen=True, kw_only=True)
class MatchingNetSettings(BackboneSettings):
    scale: Positive = setting(10.0, "what the cosine is multiplied by before the softmax; 1 in the paper")
    full_context: bool = setting(False, "embed every example in the context of the whole support")
    context_steps: Whole = setting(
        5, "of the LSTM that attends to the support", only_with=("full_context", (True,))
    )


class MatchingNet(MetricLearner):
    """Matching Networks (Vinyals et al. 2016): a query is of the classes that it attends to in the support.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        context: full context embeddings; default: none.
        scale: what the cosine is multiplied by before the softmax. The paper has 1, where five classes that
            are told apart perfectly still leave p at most 0.65, and learning is slow.
    """

    paper = "Vinyals et al. 2016"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.981,
        ("omniglot", 5, 5): 0.989,
        ("omniglot", 20, 1): 0.938,
        ("omniglot", 20, 5): 0.985,
    }
    Settings = MatchingNetSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "tasks": 4,
            "steps": 1000,
            "lr": 2e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(
        self, backbone: nn.Module, *, context: FullContext | None = None, scale: float = 10.0
    ) -> None:
        super().__init__(backbone)
        if context is not None:
            check_instance(FullContext, context=context)
        self.context = context
        self.scale = scale

    def compare(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        support, query = self._in_context(support, support_labels, query)
        return matching_loss(
            support, support_labels, query, query_labels, num_classes, scale=self.scale, ways=ways
        )

    def classify(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        support, query = self._in_context(support, support_labels, query)
        return matching_log_probs(support, support_labels, query, num_classes, scale=self.scale, ways=ways)

    def _in_context(self, support: Tensor, support_labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        if self.context is None:
            return support, query
        return self.context(support, query, support_labels != IGNORED)

    @classmethod
    def from_settings(cls, settings: MatchingNetSettings, problem: Problem) -> MatchingNet:
        backbone, (features,) = settings.build(problem)
        context = FullContext(features, steps=settings.context_steps) if settings.full_context else None
        return cls(backbone, context=context, scale=settings.scale)
