"""Relation Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count, check_instance
from metafast.data import Problem
from metafast.ops.pairwise import prototypes, relation_scores
from metafast.reference.labels import IGNORED, checked_labels
from metafast.settings import Count, setting

from .backbones import BackboneSettings
from .method import Recipes, Reported
from .metric import MetricLearner, masked_mean


class LinearRelation(nn.Module):
    """Scores pairs of vectors by a layer over both and an output: sigmoid(out . relu(W [query; class] + b)).

    Args:
        features: D.
        hidden: units of the layer.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        check_count(1, features=features, hidden=hidden)
        self.hidden = nn.Linear(2 * features, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, query: Tensor, classes: Tensor) -> Tensor:
        """query [T, Q, D], classes [T, N, D] -> scores in (0, 1), [T, Q, N]."""
        return relation_scores(
            query, classes, self.hidden.weight, self.hidden.bias, self.out.weight, self.out.bias
        )


class ConvRelation(nn.Module):
    """The paper's relation module (figure 2): two blocks of convolutions over the maps of a pair, two layers.

    The first convolution splits, as that of a concatenation is a sum, and so do the statistics of its batch
    norm over all pairs of an episode: what is made for each pair begins with the sum of two normalised maps.

    Args:
        channels: C of the maps [C, H, W], whose sides are 4 or more.
        size: (H, W).
        hidden: units of the layer before the output.
    """

    def __init__(self, channels: int, size: tuple[int, int], hidden: int = 8) -> None:
        super().__init__()
        check_count(1, channels=channels, hidden=hidden)
        check_count(4, height=size[0], width=size[1])
        self.pair = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)  # the norm has a bias
        self.norm = nn.BatchNorm2d(channels)
        self.pairs = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (size[0] // 4) * (size[1] // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, query: Tensor, classes: Tensor) -> Tensor:
        """query [T, Q, C, H, W], classes [T, N, C, H, W] -> scores in (0, 1), [T, Q, N]."""
        tasks, queries, channels = query.shape[:3]
        of_query, of_class = self.pair.weight.split(channels, 1)
        query = F.conv2d(query.flatten(0, 1), of_query, padding=1).unflatten(0, (tasks, queries))
        classes = F.conv2d(classes.flatten(0, 1), of_class, padding=1).unflatten(0, (tasks, -1))
        query, classes = self._normalised(query, classes)
        pairs = (query.unsqueeze(2) + classes.unsqueeze(1)).relu()  # [T, Q, N, C, H, W]
        return self.pairs(pairs.flatten(0, 2)).sigmoid().view(tasks, queries, -1)

    def _normalised(self, query: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """What adds up to ``self.norm`` of query + class over all pairs."""
        norm = self.norm
        if self.training:
            means = [x.mean((0, 1, 3, 4), keepdim=True) for x in (query, classes)]
            query, classes = (x - mean for x, mean in zip((query, classes), means, strict=True))
            # Over the pairs of a task the maps are independent, but for the pixel that they share.
            shared = (query.mean(1) * classes.mean(1)).mean((0, 2, 3))
            var = sum(x.square().mean((0, 1, 3, 4)) for x in (query, classes)) + 2 * shared
            with torch.no_grad():
                tasks, queries, _, height, width = query.shape
                count = tasks * queries * classes.shape[1] * height * width
                norm.running_mean.lerp_(sum(means).flatten().to(norm.running_mean), norm.momentum)
                norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var), norm.momentum)
                norm.num_batches_tracked += 1
        else:
            query, var = query - norm.running_mean.view(-1, 1, 1), norm.running_var
        scale = (norm.weight * (var + norm.eps).rsqrt()).view(-1, 1, 1)
        return query * scale + norm.bias.view(-1, 1, 1), classes * scale


@dataclass(frozen=True, kw_only=True)
class RelationNetSettings(BackboneSettings):
    head: Literal["conv", "linear"] = setting(
        "conv", "what scores a pair: convolutions over its maps, as in the paper, or a layer over two vectors"
    )
    head_hidden: Count = setting(8, "units of the head's layer")


class RelationNet(MetricLearner):
    """Relation Networks (Sung et al. 2018): a learned module scores each query with each class.

    A class is the mean of its support's embeddings (the paper's sum, whose size would depend on the shots).
    The loss is the squared error against 1 for the query's class and 0 for the others (equation 2).

    Args:
        backbone: embeds a batch of examples, [B, ...] -> what the relation takes.
        relation: query [T, Q, ...], classes [T, N, ...] -> scores in (0, 1), [T, Q, N]: a
            :class:`ConvRelation`, a :class:`LinearRelation`, or your own.
    """

    paper = "Sung et al. 2018"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.996,
        ("omniglot", 5, 5): 0.998,
        ("omniglot", 20, 1): 0.976,
        ("omniglot", 20, 5): 0.991,
    }
    Settings = RelationNetSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "tasks": 4,
            "steps": 6000,
            "lr": 1e-3,
            "schedule": "cosine",
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(self, backbone: nn.Module, relation: nn.Module) -> None:
        super().__init__(backbone)
        check_instance(nn.Module, relation=relation)
        self.relation = relation

    def scores(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """[T, Q, N], in (0, 1); those of classes that a task does not have say nothing."""
        examples = support.flatten(2)
        if ways is not None:  # every class has an example, zero where the task has none
            classes = torch.arange(num_classes, device=ways.device)
            absent = classes.masked_fill(_present(num_classes, ways), IGNORED)
            examples = torch.cat([examples, examples.new_zeros(*absent.shape, examples.shape[-1])], 1)
            support_labels = torch.cat([support_labels, absent], 1)
        classes = prototypes(examples, support_labels, num_classes)
        return self.relation(query, classes.unflatten(2, support.shape[2:]))

    def compare(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        query_labels: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        scores = self.scores(support, support_labels, query, num_classes, ways)
        labels = checked_labels("query_labels", query_labels, num_classes if ways is None else ways)
        classes = torch.arange(num_classes, device=labels.device)
        counted = (labels != IGNORED).unsqueeze(-1).expand_as(scores)
        if ways is not None:
            counted = counted & _present(num_classes, ways).unsqueeze(1)
        wanted = (labels.unsqueeze(-1) == classes).to(scores.dtype)
        return masked_mean(F.mse_loss(scores, wanted, reduction="none"), counted)

    def classify(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int,
        ways: Tensor | None = None,
    ) -> Tensor:
        """The scores, made to sum to 1 over the classes."""
        scores = self.scores(support, support_labels, query, num_classes, ways).log()
        if ways is not None:
            scores = scores.masked_fill(~_present(num_classes, ways).unsqueeze(1), -torch.inf)
        return scores.log_softmax(-1)

    @classmethod
    def from_settings(cls, settings: RelationNetSettings, problem: Problem) -> RelationNet:
        backbone, shape = settings.build(problem, maps=settings.head == "conv")
        if settings.head == "linear":
            return cls(backbone, LinearRelation(*shape, settings.head_hidden))
        if min(shape[1:]) < 4:
            raise ValueError(f"image_size: expected images that leave maps of 4x4 or more, got {shape[1:]}")
        return cls(backbone, ConvRelation(shape[0], shape[1:], settings.head_hidden))


def _present(num_classes: int, ways: Tensor) -> Tensor:
    """Which of the classes the tasks have: ways [T] -> [T, N]."""
    return torch.arange(num_classes, device=ways.device) < ways.unsqueeze(-1)
