"""The libraries. They work on one episode at a time, as their users call them, and loop over the tasks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common.cases import Skip
from bench.pairwise.workloads import CHECKED_TASKS, Episodes


def episode_loop(
    loss_of: Callable[..., Tensor],
    episodes: Episodes,
    targets: Tensor,
    shared: Sequence[Tensor],
    backward: bool,
) -> Callable[[], list[tuple[Tensor, ...]]]:
    """One step per episode, as the libraries' users train."""
    parts = [
        (s.clone().requires_grad_(backward), labels, q.clone().requires_grad_(backward), t)
        for s, labels, q, t in zip(
            *map(episodes.per_task, (episodes.support, episodes.support_labels, episodes.query, targets)),
            strict=True,
        )
    ]

    def call() -> list[tuple[Tensor, ...]]:
        results = []
        for s, labels, q, t in parts:
            with torch.set_grad_enabled(backward):
                loss = loss_of(s, labels, q, t)
            results.append((loss, *torch.autograd.grad(loss, (s, q, *shared))) if backward else (loss,))
        return results

    return call


def from_loop(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Per episode -> of the mean loss of all episodes."""
    loss, *grads = zip(*results, strict=True)
    of_tasks = [torch.stack(g) / len(results) for g in grads[:2]]
    return [torch.stack(loss).mean(), *of_tasks, *(torch.stack(g).mean(0) for g in grads[2:])]


def loop_collect(episodes: Episodes) -> Callable[[object], list[Tensor]]:
    def collect(results: object) -> list[Tensor]:
        loss, *grads = from_loop(results)
        return [loss, *(g[:CHECKED_TASKS] for g in grads[:2]), *grads[2:]]

    return collect


@functools.cache
def import_easyfsl() -> types.ModuleType:
    """easyfsl.methods.

    Its package imports its ResNets, which import four names from torchvision; there is no torchvision for
    every build of torch, and the methods need none of it. Where it is missing, empty modules stand in during
    the import.
    """
    stand_ins = []
    if importlib.util.find_spec("torchvision") is None:
        stand_ins = ["torchvision", "torchvision.models", "torchvision.models.resnet"]
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
    if stand_ins:
        for name in ("BasicBlock", "Bottleneck", "conv1x1", "conv3x3"):
            setattr(sys.modules[stand_ins[-1]], name, nn.Module)
    try:
        return importlib.import_module("easyfsl.methods")
    except ImportError as error:
        raise Skip(f"cannot import easyfsl: {error}") from None
    finally:
        for name in stand_ins:
            del sys.modules[name]


def easyfsl_prototypical_loss() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(support [S, D], support_labels [S], query [Q, D], query_labels [Q]) -> loss, euclidean."""
    model = import_easyfsl().PrototypicalNetworks()

    def loss(support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
        model.process_support_set(support, support_labels)
        return F.cross_entropy(model(query), query_labels)

    return loss


def easyfsl_relation_loss(
    head: Sequence[Tensor],
) -> tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], list[nn.Parameter]]:
    """As above with targets [Q, N] for query_labels; and the parameters of the head."""
    weight, bias, out_weight, out_bias = head
    features = weight.shape[1] // 2
    first, last = nn.Linear(2 * features, len(bias)), nn.Linear(len(bias), 1)
    first.weight, first.bias = nn.Parameter(weight.roll(features, 1)), nn.Parameter(bias)
    last.weight, last.bias = nn.Parameter(out_weight), nn.Parameter(out_bias)
    module = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last, nn.Sigmoid())
    model = import_easyfsl().RelationNetworks(feature_dimension=features, relation_module=module)

    def loss(support: Tensor, support_labels: Tensor, query: Tensor, targets: Tensor) -> Tensor:
        model.process_support_set(support[..., None, None], support_labels)
        return F.mse_loss(model(query[..., None, None]), targets)

    return loss, list(module.parameters())


def _import_distances() -> types.ModuleType:
    try:
        return importlib.import_module("pytorch_metric_learning.distances")
    except ImportError as error:
        raise Skip(f"cannot import pytorch-metric-learning: {error}") from None


def pml_sqeuclidean() -> Callable[[Tensor, Tensor], Tensor]:
    return _import_distances().LpDistance(normalize_embeddings=False, p=2, power=2)


def pml_cosine() -> Callable[[Tensor, Tensor], Tensor]:
    return _import_distances().CosineSimilarity()
