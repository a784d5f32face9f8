"""The operations that the contract (test_contract.py) is checked for. A new operation adds a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Generator, Tensor

WAY = 3


@dataclass(frozen=True)
class Sizes:
    tasks: int = 2
    support: int = 6
    query: int = 4
    features: int = 3


@dataclass(frozen=True)
class Row:
    """An operation with some options, as a function of tensors only."""

    name: str
    call: Callable[[ModuleType], Callable[..., Tensor]]  # of metafast, or of metafast.reference
    make: Callable[[Sizes, Generator], tuple[Tensor, ...]]  # float64 and int64 tensors
    differentiable: tuple[int, ...]  # positions among the tensors
    shared: tuple[int, ...] = ()  # positions of tensors without leading dimensions
    op: str = ""  # the registered op
    float32_under_autocast: bool = True

    def __str__(self) -> str:
        return self.name

    def per_task(self, args: tuple[Tensor, ...]) -> tuple[int | None, ...]:
        """in_dims for a vmap over tasks."""
        return tuple(None if i in self.shared else 0 for i in range(len(args)))


def embeddings(sizes: Sizes, count: int, generator: Generator) -> Tensor:
    return torch.randn(sizes.tasks, count, sizes.features, dtype=torch.float64, generator=generator)


def ways(sizes: Sizes) -> Tensor:
    return torch.arange(sizes.tasks) % 2 + WAY - 1


def labels(sizes: Sizes, count: int, generator: Generator, limit: Tensor | None = None) -> Tensor:
    """Every class where there is room, some example ignored where there is more, in random order."""
    rows = []
    for task in range(sizes.tasks):
        way = WAY if limit is None else int(limit[task])
        row = torch.cat(
            [torch.arange(way), torch.randint(0, way, (max(count - way, 0),), generator=generator)]
        )[:count]
        if count > way:
            row[-1] = -100
        rows.append(row[torch.randperm(count, generator=generator)])
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.int64)


def _support(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    return embeddings(sizes, sizes.support, g), labels(sizes, sizes.support, g)


def _pair(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    return embeddings(sizes, sizes.query, g), embeddings(sizes, WAY, g)


def _weighted_pair(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    return *_pair(sizes, g), torch.rand(sizes.features, dtype=torch.float64, generator=g) + 0.5


def _unlabelled(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    return *_support(sizes, g), embeddings(sizes, sizes.query, g)


def _episode(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    return *_unlabelled(sizes, g), labels(sizes, sizes.query, g)


def _ragged_episode(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    limit = ways(sizes)
    return (
        embeddings(sizes, sizes.support, g),
        labels(sizes, sizes.support, g, limit),
        embeddings(sizes, sizes.query, g),
        labels(sizes, sizes.query, g, limit),
        limit,
    )


def _relation(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    hidden = 5
    shapes = ((hidden, 2 * sizes.features), (hidden,), (1, hidden), (1,))
    head = (torch.randn(*shape, dtype=torch.float64, generator=g) / 2 for shape in shapes)
    return *_pair(sizes, g), *head


def _distance(metric: str) -> Row:
    return Row(
        f"pairwise_distance[{metric}]",
        lambda m: lambda x, y: m.pairwise_distance(x, y, metric),
        _pair,
        (0, 1),
        op="pairwise",
    )


def _weighted(metric: str) -> Row:
    return Row(
        f"pairwise_distance[{metric}, weight]",
        lambda m: lambda x, y, weight: m.pairwise_distance(x, y, metric, weight=weight),
        _weighted_pair,
        (0, 1, 2),
        shared=(2,),
        op="pairwise",
    )


def _log_probs(name: str, metric: str) -> Row:
    return Row(
        f"{name}[{metric}]",
        lambda m: lambda s, sl, q: getattr(m, name)(s, sl, q, WAY, metric=metric),
        _unlabelled,
        (0, 2),
        op="classify",
    )


def _loss(name: str, metric: str, reduction: str, **options: float) -> Row:
    return Row(
        f"{name}[{metric}, {reduction}]",
        lambda m: (
            lambda s, sl, q, ql: getattr(m, name)(
                s, sl, q, ql, WAY, metric=metric, reduction=reduction, **options
            )
        ),
        _episode,
        (0, 2),
        op="classify",
    )


def _ragged(name: str, metric: str, reduction: str) -> Row:
    return Row(
        f"{name}[{metric}, {reduction}, ways]",
        lambda m: (
            lambda s, sl, q, ql, w: getattr(m, name)(
                s, sl, q, ql, WAY, metric=metric, reduction=reduction, ways=w
            )
        ),
        _ragged_episode,
        (0, 2),
        op="classify",
    )


def _scores(activation: str) -> Row:
    return Row(
        f"relation_scores[{activation}]",
        lambda m: lambda *tensors: m.relation_scores(*tensors, activation=activation),
        _relation,
        (0, 1, 2, 3, 4, 5),
        shared=(2, 3, 4, 5),
        op="pairwise",
    )


ROWS = (
    Row(
        "prototypes",
        lambda m: lambda embeddings, labels: m.prototypes(embeddings, labels, WAY),
        _support,
        (0,),
        op="prototypes",
        float32_under_autocast=False,
    ),
    *map(_distance, ("sqeuclidean", "euclidean", "cosine", "cityblock", "dot")),
    *map(_weighted, ("sqeuclidean", "cityblock")),
    _log_probs("prototypical_log_probs", "sqeuclidean"),
    _log_probs("matching_log_probs", "cosine"),
    _loss("prototypical_loss", "sqeuclidean", "mean"),
    _loss("prototypical_loss", "cosine", "none"),
    _ragged("prototypical_loss", "euclidean", "sum"),
    _loss("matching_loss", "cosine", "mean", scale=3.0),
    _loss("matching_loss", "dot", "sum"),
    _ragged("matching_loss", "cityblock", "none"),
    *map(_scores, ("relu", "tanh")),
)
