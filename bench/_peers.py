"""The competitors: each computation as people write it today, in PyTorch, in JAX and with libraries.

They are given every advantage that the data allows: support examples lie sorted by class, so that class means
are a reshape, and with one shot the sum over a class's examples in Matching Networks is left out. metafast
takes labels in any order.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._harness import Skip

# --- PyTorch ----------------------------------------------------------------------------------------------
# x [..., Q, D], y [..., N, D] -> [..., Q, N]


def sqeuclidean_broadcasting(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def sqeuclidean_cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square()


def _matmul_add(start: Tensor, x: Tensor, y: Tensor, alpha: float, beta: float = 1.0) -> Tensor:
    """beta start + alpha x y^T, in one call."""
    fused = torch.addmm if x.dim() == 2 else torch.baddbmm
    return fused(start, x, y.mT, alpha=alpha, beta=beta)


def sqeuclidean_bmm(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return _matmul_add(norms, x, y, alpha=-2.0)


def logits_broadcasting(x: Tensor, y: Tensor) -> Tensor:
    return -sqeuclidean_broadcasting(x, y)


def logits_cdist(x: Tensor, y: Tensor) -> Tensor:
    return -sqeuclidean_cdist(x, y)


def logits_bmm(x: Tensor, y: Tensor) -> Tensor:
    return -sqeuclidean_bmm(x, y)


def logits_bmm_without_query_norm(x: Tensor, y: Tensor) -> Tensor:
    """2 x y^T - |y|^2: softmax does not see |x|^2, the same for all classes."""
    return _matmul_add(y.square().sum(-1).unsqueeze(-2), x, y, alpha=2.0, beta=-1.0)


def cosine_bmm(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def cosine_broadcasting(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1)


def class_means(support: Tensor, way: int) -> Tensor:
    """[..., S, D], sorted by class -> [..., N, D]"""
    return support.unflatten(-2, (way, -1)).mean(-2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def prototypical_loss(
    logits: Callable[[Tensor, Tensor], Tensor], support: Tensor, query: Tensor, labels: Tensor, way: int
) -> Tensor:
    return cross_entropy(logits(query, class_means(support, way)), labels)


def matching_loss(
    cosine: Callable[[Tensor, Tensor], Tensor], support: Tensor, query: Tensor, labels: Tensor, way: int
) -> Tensor:
    similarity = cosine(query, support)  # [..., Q, S]
    if similarity.shape[-1] == way:
        return cross_entropy(similarity, labels)
    log_attention = F.log_softmax(similarity, -1)
    of_class = log_attention.unflatten(-1, (way, -1)).logsumexp(-1)
    return F.nll_loss(of_class.flatten(0, -2), labels.flatten())


def relation_scores_split(
    query: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    """W [q; p] + b = Wq q + (Wp p + b), so each vector passes its half of the layer once."""
    of_query, of_class = weight.chunk(2, 1)
    hidden = F.linear(query, of_query).unsqueeze(-2) + F.linear(prototypes, of_class, bias).unsqueeze(-3)
    return torch.sigmoid(F.linear(hidden.relu(), out_weight, out_bias).squeeze(-1))


def relation_scores_concatenated(
    query: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    pair = torch.broadcast_tensors(query.unsqueeze(-2), prototypes.unsqueeze(-3))
    hidden = F.linear(torch.cat(pair, -1), weight, bias)
    return torch.sigmoid(F.linear(hidden.relu(), out_weight, out_bias).squeeze(-1))


def relation_loss(
    scores: Callable[..., Tensor], support: Tensor, query: Tensor, *head: Tensor, targets: Tensor, way: int
) -> Tensor:
    """The mean squared error of Relation Networks. targets [..., Q, N]: 1 for the right class, else 0."""
    return F.mse_loss(scores(query, class_means(support, way), *head), targets)


# --- JAX --------------------------------------------------------------------------------------------------


def import_jax(device: torch.device) -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of the GPU's memory
    try:
        jax = importlib.import_module("jax")
    except ImportError as error:
        raise Skip(f"cannot import jax: {error}") from None
    if (device.type == "cuda") != (jax.default_backend() == "gpu"):
        raise Skip(f"jax runs on {jax.default_backend()} here, not on {device.type}")
    return jax


def jax_array(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.array(tensor.cpu().numpy())


def jax_class_means(support: Any, way: int) -> Any:
    return support.reshape(*support.shape[:-2], way, -1, support.shape[-1]).mean(-2)


def _jax_nll(log_probs: Any, labels: Any) -> Any:
    import jax.numpy as jnp

    return -jnp.take_along_axis(log_probs, labels[..., None], -1).mean()


def jax_prototypical_loss(support: Any, query: Any, *, labels: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    prototypes = jax_class_means(support, way)
    logits = 2 * jnp.einsum("...qd,...nd->...qn", query, prototypes) - (prototypes**2).sum(-1)[..., None, :]
    return _jax_nll(jax.nn.log_softmax(logits), labels)


def jax_matching_loss(support: Any, query: Any, *, labels: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    def unit(x: Any) -> Any:
        return x / jnp.sqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-16))

    query, support = unit(query), unit(support)
    log_attention = jax.nn.log_softmax(jnp.einsum("...qd,...sd->...qs", query, support))
    if support.shape[-2] != way:
        log_attention = jax.nn.logsumexp(log_attention.reshape(*log_attention.shape[:-1], way, -1), -1)
    return _jax_nll(log_attention, labels)


def jax_relation_loss(support: Any, query: Any, *head: Any, targets: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    weight, bias, out_weight, out_bias = head
    of_query, of_class = jnp.split(weight, 2, 1)
    query = jnp.einsum("...qd,hd->...qh", query, of_query)
    prototypes = jnp.einsum("...nd,hd->...nh", jax_class_means(support, way), of_class) + bias
    hidden = jax.nn.relu(query[..., :, None, :] + prototypes[..., None, :, :])
    scores = jax.nn.sigmoid(jnp.einsum("...qnh,h->...qn", hidden, out_weight[0]) + out_bias[0])
    return ((scores - targets) ** 2).mean()


def jax_sqeuclidean(x: Any, y: Any) -> Any:
    import jax.numpy as jnp

    return (x**2).sum(-1)[:, None] - 2 * jnp.einsum("qd,nd->qn", x, y) + (y**2).sum(-1)


# --- libraries --------------------------------------------------------------------------------------------


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
