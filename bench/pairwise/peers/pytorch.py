"""The competitors in PyTorch: eager, compiled, in several formulations.

They are given every advantage that the data allows: support examples lie sorted by class, so that class means
are a reshape, and with one shot the sum over a class's examples in Matching Networks is left out. metafast
takes labels in any order.

x [..., Q, D], y [..., N, D] -> [..., Q, N]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_call(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool, grad: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    if not backward:
        return lambda: (function(*tensors),)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, grad))

    return call


def compiled_call(function: Callable[..., Tensor], *args, **kwargs) -> Callable[[], tuple[Tensor, ...]]:
    return torch_call(torch.compile(function, dynamic=False), *args, **kwargs)


# --- distances and logits ----------------------------------------------------------------------------------


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


# --- losses ------------------------------------------------------------------------------------------------


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
