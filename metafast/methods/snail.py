"""SNAIL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count
from metafast.data import Episodes, Problem
from metafast.settings import Count, setting

from .backbones import BackboneSettings
from .method import Recipes, Reported
from .sequence import SequenceLearner


@dataclass(frozen=True, kw_only=True)
class SNAILSettings(BackboneSettings):
    length: Count = setting(6, "of a sequence that the convolutions reach over: ways times shots, plus 1")
    filters: Count = setting(128, "of a convolution")


class SNAIL(SequenceLearner):
    """A simple neural attentive learner (Mishra et al. 2018): causal convolutions and causal attention.

    The sequence of an episode is the support with its labels and a query without; the network's output for
    the query is the prediction. Attention looks one thing up, convolutions gather what lies before.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        features: D.
        ways: N, the classes of an episode.
        length: of a sequence, N shots + 1: how far the convolutions reach. Other lengths work as well.
        filters: of a convolution (128 in the paper).
    """

    paper = "Mishra, Rohaninejad, Chen, Abbeel 2018"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.9907,
        ("omniglot", 5, 5): 0.9978,
        ("omniglot", 20, 1): 0.9764,
        ("omniglot", 20, 5): 0.9936,
    }
    Settings = SNAILSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "tasks": 8,
            "steps": 4000,
            "lr": 1e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(
        self, backbone: nn.Module, features: int, ways: int, length: int, *, filters: int = 128
    ) -> None:
        super().__init__(backbone, ways)
        check_count(1, features=features, length=length, filters=filters)
        self.layers = nn.ModuleList()
        channels = features + ways
        # Section 5.1's network for Omniglot: attention, then twice convolutions and attention.
        for keys, values in ((64, 32), (256, 128), (512, 256)):
            if self.layers:
                self.layers.append(CausalConvolutions(channels, length, filters))
                channels = self.layers[-1].outputs
            self.layers.append(CausalAttention(channels, keys, values))
            channels = self.layers[-1].outputs
        self.out = nn.Linear(channels, ways)

    def logits(self, episodes: Episodes) -> Tensor:
        """[T, Q, N]; in training the support of each task in a random order.

        All queries of a task share what the layers make of its support: no step of it sees a query.
        """
        order, lengths = self.order(episodes.support_labels)
        count, queries = order.shape[1], episodes.query.shape[1]
        embedded = self.embed(torch.cat([episodes.support, episodes.query], 1))
        support, query = embedded.split([count, queries], 1)
        support = torch.cat([support, self.one_hot(episodes.support_labels, support)], -1)
        support = support.gather(1, order.unsqueeze(-1).expand_as(support))
        x = torch.cat([support, F.pad(query, (0, self.ways))], 1)  # a query has no label
        for layer in self.layers:
            x = layer(x, lengths, queries)
        return self.of_classes(self.out(x[:, count:]), episodes)

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean cross entropy of the queries: a scalar."""
        return F.cross_entropy(self.logits(episodes).flatten(0, 1), episodes.query_labels.flatten())

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query): [T, Q, N]."""
        return self.logits(episodes).log_softmax(-1)

    @classmethod
    def from_settings(cls, settings: SNAILSettings, problem: Problem) -> SNAIL:
        backbone, (features,) = settings.build(problem)
        return cls(backbone, features, problem.outputs, settings.length, filters=settings.filters)


class CausalConvolutions(nn.Module):
    """A TC block: dense blocks whose reach doubles until it covers the sequence (figure 2).

    A dense block adds ``filters`` channels tanh(a) sigmoid(b) to its input, a and b causal convolutions over
    two steps.
    """

    def __init__(self, channels: int, length: int, filters: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()  # of a step, and of the one that it reaches back to
        for _ in range(max(1, math.ceil(math.log2(length)))):
            self.blocks.append(nn.Linear(2 * channels, 2 * filters))
            channels += filters
        self.outputs = channels

    def forward(self, x: Tensor, lengths: Tensor, queries: int = 1) -> Tensor:
        """[B, S + queries, channels] -> [B, S + queries, outputs].

        Each of the last steps by itself follows the first ``lengths``, [B], of the S before them.
        """
        for power, block in enumerate(self.blocks):
            earlier = F.pad(x[:, :-queries], (0, 0, 2**power, 0))  # zero before the sequence
            last = earlier[torch.arange(len(x), device=x.device), lengths].unsqueeze(1)
            earlier = torch.cat([earlier[:, : x.shape[1] - queries], last.expand(-1, queries, -1)], 1)
            value, gate = block(torch.cat([x, earlier], -1)).chunk(2, -1)
            x = torch.cat([x, value.tanh() * gate.sigmoid()], -1)
        return x


class CausalAttention(nn.Module):
    """An attention block: adds to its input what each step finds in those up to itself (figure 2)."""

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.sizes = [keys, keys, values]
        self.project = nn.Linear(channels, sum(self.sizes))
        self.outputs = channels + values

    def forward(self, x: Tensor, lengths: Tensor, queries: int = 1) -> Tensor:
        """As that of :class:`CausalConvolutions`."""
        steps = torch.arange(x.shape[1], device=x.device)
        earlier = steps < torch.minimum(steps, lengths.unsqueeze(1)).unsqueeze(2)  # [B, step, earlier step]
        seen = earlier | (steps == steps.unsqueeze(1))
        query, key, value = self.project(x).split(self.sizes, -1)
        return torch.cat([x, F.scaled_dot_product_attention(query, key, value, attn_mask=seen)], -1)
