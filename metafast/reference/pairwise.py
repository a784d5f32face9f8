"""Reference of the pairwise family: prototypes, distances, relation scores, matching attention, losses.

The seven public functions have the signatures of `metafast.ops.pairwise`; `pairwise` and `classify` are twins
of the registered operations beneath them. Leading batch dimensions broadcast. The result has the input's
dtype; float16 and bfloat16 are computed in float32, and under autocast all but `prototypes` is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import IGNORED, checked_labels, checked_support_labels, checked_ways

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_COSINE_EPS = 1e-8  # the smallest norm that cosine divides by, as in F.cosine_similarity

Result = TypeVar("Result")


def autocast_enabled(tensor: Tensor) -> bool:
    """Is autocast on where the tensor lives? (There is none for the meta device.)"""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def outside_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function in the dtypes of its arguments, whatever autocast would make of the ops inside it."""

    @functools.wraps(function)
    def wrapper(*args, **options) -> Result:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if not autocast_enabled(first):
            return function(*args, **options)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **options)

    return wrapper


def float32_under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of float32 tensors under autocast, as the compiled operations are (and torch.cdist)."""
    inner = outside_autocast(function)

    @functools.wraps(function)
    def wrapper(*args, **options) -> Tensor:
        def cast(value):
            low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.float() if low else value

        if not autocast_enabled(args[0]):
            return function(*args, **options)
        return inner(*map(cast, args), **options)

    return wrapper


def wide(tensor: Tensor) -> Tensor:
    """The dtype to compute in: float32 for the 16-bit types, else the tensor's own."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _members(labels: Tensor, num_classes: int) -> Tensor:
    """[..., S] -> [..., N, S], bool: is example s of class n? An ignored example is of none."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels.unsqueeze(-2) == classes.unsqueeze(-1)


def _without_ignored(embeddings: Tensor, labels: Tensor) -> Tensor:
    """[..., S, D] with zeros for ignored examples, whatever they hold: 0 times NaN would be NaN."""
    return torch.where((labels == IGNORED).unsqueeze(-1), 0.0, embeddings)


def _absent(ways: Tensor | None, num_classes: int) -> Tensor | None:
    """[...] -> [..., N], bool: classes from ways[t] on do not exist in episode t."""
    return None if ways is None else torch.arange(num_classes, device=ways.device) >= ways.unsqueeze(-1)


@outside_autocast
def _class_means(embeddings: Tensor, labels: Tensor, num_classes: int, absent: Tensor | None) -> Tensor:
    member = _members(labels, num_classes).to(embeddings.dtype)  # [..., N, S]
    count = member.sum(-1, keepdim=True)  # [..., N, 1]
    if absent is not None:
        count = count.masked_fill(absent.unsqueeze(-1), 1)  # 0 / 1, so that no NaN reaches a gradient
    return member @ embeddings / count


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean embedding of each class: [..., S, D], [..., S] -> [..., N, D]."""
    labels = checked_support_labels("labels", labels, num_classes, _members(labels, num_classes))
    used = _without_ignored(wide(embeddings), labels)
    return _class_means(used, labels, num_classes, None).to(embeddings.dtype)


def _sqrt_or_zero(square: Tensor) -> Tensor:
    """sqrt whose derivatives of every order are 0 at 0, where those of torch.sqrt are infinite."""
    zero = square <= 0  # not NaN, which stays
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _unit(x: Tensor) -> Tensor:
    # Clamping the square before the root is max(|x|, eps), and leaves no infinite derivative at x = 0.
    return x / x.square().sum(-1, keepdim=True).clamp_min(_COSINE_EPS**2).sqrt()


@float32_under_autocast
def pairwise(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str) -> Tensor:
    """out[q, n] = link(bias + sum_d weight[d] * phi(x[q, d], y[n, d])).

    [..., Q, D], [..., N, D], [D], [1] -> [..., Q, N]
    """
    if weight is not None and metric in ("euclidean", "cosine", "dot"):
        raise ValueError(f"weight: metric {metric!r} takes none")
    dtype = x.dtype
    x, y = wide(x), wide(y)
    if metric == "dot":
        return -(x @ y.mT).to(dtype)
    if metric == "cosine":
        return (1 - _unit(x) @ _unit(y).mT).to(dtype)

    x, y = x.unsqueeze(-2), y.unsqueeze(-3)  # [..., Q, 1, D], [..., 1, N, D]
    if metric in ("sqeuclidean", "euclidean"):
        terms = (x - y).square()
    elif metric == "cityblock":
        terms = (x - y).abs()
    elif metric == "relation_relu":
        terms = F.relu(x + y)
    elif metric == "relation_tanh":
        terms = torch.tanh(x + y)
    else:
        raise ValueError(f"metric: unknown {metric!r}")
    total = (terms if weight is None else terms * wide(weight)).sum(-1)
    if bias is not None:
        total = total + wide(bias)
    if metric == "euclidean":
        total = _sqrt_or_zero(total)
    elif metric.startswith("relation"):
        total = torch.sigmoid(total)
    return total.to(dtype)


def pairwise_distance(
    x: Tensor, y: Tensor, metric: str = "sqeuclidean", *, weight: Tensor | None = None
) -> Tensor:
    """The distance of every x to every y: [..., Q, D], [..., N, D] -> [..., Q, N]."""
    return pairwise(x, y, weight, None, metric)


def _prototypical(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    num_classes: int,
    metric: str,
    absent: Tensor | None,
) -> Tensor:
    rows = _class_means(support, support_labels, num_classes, absent)
    logits = -pairwise(query, rows, None, None, metric)
    if absent is not None:
        logits = logits.masked_fill(absent.unsqueeze(-2), torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, -1)


def _matching(
    support: Tensor, support_labels: Tensor, query: Tensor, num_classes: int, metric: str, scale: float
) -> Tensor:
    logits = -scale * pairwise(query, support, None, None, metric)  # [..., Q, S]
    lowest = torch.finfo(logits.dtype).min  # exp(lowest - anything) is 0, and lowest - lowest is no NaN
    member = _members(support_labels, num_classes).unsqueeze(-3)  # [..., 1, N, S]
    of_class = torch.where(member, logits.unsqueeze(-2), lowest).logsumexp(-1)  # [..., Q, N]
    taking_part = (support_labels != IGNORED).unsqueeze(-2)  # [..., 1, S]
    of_all = torch.where(taking_part, logits, lowest).logsumexp(-1, keepdim=True)  # [..., Q, 1]
    return of_class - of_all


def reduction_code(reduction: str) -> int:
    """The number by which the registered operation knows a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return REDUCTIONS[reduction]


def reduce_nll(nll: Tensor, query_labels: Tensor, reduction: int) -> Tensor:
    """[..., Q] -> [], unless the reduction is "none". The mean is over the queries that are not ignored."""
    if reduction == REDUCTIONS["none"]:
        return nll
    total = wide(nll).sum()
    if reduction == REDUCTIONS["mean"]:
        total = total / (query_labels != IGNORED).expand(nll.shape).sum()
    return total.to(nll.dtype)


@float32_under_autocast
def classify(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: Tensor | None,
    num_classes: int,
    method: str,
    metric: str,
    scale: float,
    reduction: int,
) -> Tensor:
    """Log probabilities [..., Q, N], or with `query_labels` their negative log likelihood."""
    dtype = support.dtype
    support, query = wide(support), wide(query)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected a number >= 1, got {num_classes}")
    ways = None if ways is None else checked_ways(ways, num_classes)
    classes = num_classes if ways is None else ways
    member = _members(support_labels, num_classes)
    support_labels = checked_support_labels("support_labels", support_labels, classes, member)
    if query_labels is not None:
        query_labels = checked_labels("query_labels", query_labels, classes)
    support = _without_ignored(support, support_labels)
    absent = _absent(ways, num_classes)
    if method == "prototypical":
        log_probs = _prototypical(support, support_labels, query, num_classes, metric, absent)
    else:
        log_probs = _matching(support, support_labels, query, num_classes, metric, scale)
    if absent is not None:
        log_probs = log_probs.masked_fill(absent.unsqueeze(-2), -torch.inf)
    if query_labels is None:
        return log_probs.to(dtype)
    of_label = query_labels.unsqueeze(-1) == torch.arange(num_classes, device=query.device)
    nll = -torch.where(of_label, log_probs, 0.0).sum(-1)  # [..., Q]; an ignored label is no class
    return reduce_nll(nll, query_labels, reduction).to(dtype)


def prototypical_log_probs(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    ways: Tensor | None = None,
) -> Tensor:
    """log p(class | query) of Prototypical Networks: -> [..., Q, N]."""
    return classify(support, support_labels, query, None, ways, num_classes, "prototypical", metric, 1.0, 0)


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    ways: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The negative log likelihood of Prototypical Networks."""
    return classify(
        support,
        support_labels,
        query,
        query_labels,
        ways,
        num_classes,
        "prototypical",
        metric,
        1.0,
        reduction_code(reduction),
    )


def matching_log_probs(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    num_classes: int,
    *,
    metric: str = "cosine",
    scale: float = 1.0,
    ways: Tensor | None = None,
) -> Tensor:
    """log p(class | query) of Matching Networks: -> [..., Q, N]."""
    return classify(support, support_labels, query, None, ways, num_classes, "matching", metric, scale, 0)


def matching_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    metric: str = "cosine",
    scale: float = 1.0,
    ways: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The negative log likelihood of Matching Networks."""
    return classify(
        support,
        support_labels,
        query,
        query_labels,
        ways,
        num_classes,
        "matching",
        metric,
        scale,
        reduction_code(reduction),
    )


def relation_scores(
    query: Tensor,
    prototypes: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    activation: str = "relu",
) -> Tensor:
    """sigmoid(out . act(W [query; prototype] + b)) of every pair: -> [..., Q, N]."""
    act = {"relu": F.relu, "tanh": torch.tanh}[activation]
    scores = _relation(query, prototypes, weight, bias, out_weight.reshape(-1), out_bias.reshape(()), act=act)
    return scores if autocast_enabled(query) else scores.to(query.dtype)


@float32_under_autocast
def _relation(*tensors: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores; of 16-bit tensors, or under autocast, float32."""
    query, prototypes, weight, bias, out_weight, out_bias = map(wide, tensors)
    queries, classes = query.unsqueeze(-2), prototypes.unsqueeze(-3)
    queries, classes = torch.broadcast_tensors(queries, classes)  # [..., Q, N, D]
    hidden = act(F.linear(torch.cat([queries, classes], -1), weight, bias))  # [..., Q, N, H]
    return torch.sigmoid(hidden @ out_weight + out_bias)
