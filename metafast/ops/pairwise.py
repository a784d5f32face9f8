"""Prototypes, distances, relation scores and matching attention between query and support; their losses.

Shapes: S support examples, Q queries, N classes ("way"), D features, H hidden units; "..." are leading batch
dimensions, one episode each, which broadcast over the arguments as in `torch.cdist`. Labels are int64; -100
is ignored (torch's `ignore_index`): that is how episodes of unequal size are padded into one batch.

Dtypes: float32 and float64; float16 and bfloat16 are computed in float32 and returned in their own dtype.
Under autocast all but `prototypes` run in float32, as `torch.cdist` does. Every function is differentiable
twice, works in `torch.compile(fullgraph=True)` and in `torch.func` transforms, and gives the same bits with
any number of threads.

Errors: TypeError for a type or a dtype, ValueError for a shape, a device or an option that does not fit,
naming the argument. On the CPU, values raise ValueError too: a label that is no class, a class without an
example. On CUDA they are asserted on the device, as in torch's own losses, so that no call waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast import _C
from metafast._dispatch import doors
from metafast._dispatch.arguments import blame
from metafast._dispatch.doors import Chain, Op
from metafast.reference import pairwise as reference

METRICS = ("sqeuclidean", "euclidean", "cosine", "cityblock", "dot")
_WEIGHTED = ("sqeuclidean", "cityblock")
_ACTIVATIONS = {"relu": "relation_relu", "tanh": "relation_tanh"}


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean embedding of every class: its prototype (Snell et al. 2017, equation 1).

    Args:
        embeddings: [..., S, D], float.
        labels: [..., S], int64: the class of each example, or -100 to leave it out.
        num_classes: N.

    Returns:
        [..., N, D], in the dtype of `embeddings`.

    Raises:
        ValueError: a class has no example, or a label is neither -100 nor in [0, num_classes) (CPU).

    Equivalent to::

        one_hot = F.one_hot(labels, num_classes).to(embeddings).mT      # [..., N, S]
        one_hot @ embeddings / one_hot.sum(-1, keepdim=True)
    """
    try:
        if embeddings.shape[:-2] != labels.shape[:-1]:
            embeddings, labels = _broadcast(embeddings=(embeddings, 2), labels=(labels, 1))
        return doors.call(_PROTOTYPES, embeddings, labels, num_classes)
    except Exception:
        blame({"embeddings": embeddings, "labels": labels}, integers={"num_classes": num_classes})
        raise


def pairwise_distance(
    x: Tensor, y: Tensor, metric: str = "sqeuclidean", *, weight: Tensor | None = None
) -> Tensor:
    """The distance of every x to every y; squared and euclidean ones without cancellation, never negative.

    Args:
        x: [..., Q, D], float.
        y: [..., N, D], the dtype of `x`.
        metric: one of

            - ``"sqeuclidean"``: sum_d w_d (x_d - y_d)^2
            - ``"euclidean"``: its square root without weight, of gradient 0 where the distance is 0
            - ``"cityblock"``: sum_d w_d abs(x_d - y_d); with a learned w, of Koch et al. 2015, section 3.1
            - ``"cosine"``: 1 - x.y / (max(norm(x), 1e-8) max(norm(y), 1e-8))
            - ``"dot"``: -x.y
        weight: [D], for sqeuclidean and cityblock; ones if not given.

    Returns:
        [..., Q, N], in the dtype of `x`.

    Equivalent to::

        (weight * (x.unsqueeze(-2) - y.unsqueeze(-3)) ** 2).sum(-1)     # sqeuclidean; holds [..., Q, N, D]
    """
    _check_metric(metric)
    if weight is not None and metric not in _WEIGHTED:
        raise ValueError(
            f"weight: expected None with metric {metric!r}, got a tensor (it fits {', '.join(_WEIGHTED)})"
        )
    try:
        if x.shape[:-2] != y.shape[:-2]:
            x, y = _broadcast(x=(x, 2), y=(y, 2))
        return doors.call(_PAIRWISE, x, y, weight, None, metric)
    except Exception:
        blame({"x": x, "y": y} | ({} if weight is None else {"weight": weight}))
        raise


def prototypical_log_probs(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    ways: Tensor | None = None,
) -> Tensor:
    """log p(class | query) of Prototypical Networks (Snell et al. 2017, equation 2).

    Args:
        support: [..., S, D], float.
        support_labels: [..., S], int64, -100 to leave an example out. Every class needs an example.
        query: [..., Q, D], the dtype of `support`.
        num_classes: N.
        metric: as in `pairwise_distance`.
        ways: [...], int64 in [1, N]: how many classes each episode has. Classes from `ways` on are absent:
            their log probability is -inf and they get no gradient.

    Returns:
        [..., Q, N], in the dtype of `support`.

    Raises:
        ValueError: a class that is not absent has no example, or a label is out of range (CPU).

    Equivalent to::

        F.log_softmax(-torch.cdist(query, prototypes(support, support_labels, num_classes)) ** 2, -1)
    """
    return _classify(support, support_labels, query, None, ways, num_classes, "prototypical", metric, 1.0, 0)


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
    """The loss of Prototypical Networks, -log p(label | query) (Snell et al. 2017, algorithm 1), fused.

    Args:
        support: [..., S, D], float.
        support_labels: [..., S], int64, -100 to leave an example out. Every class needs an example.
        query: [..., Q, D], the dtype of `support`.
        query_labels: [..., Q], int64, -100 to leave a query out.
        num_classes: N.
        metric: as in `pairwise_distance`.
        ways: [...], int64 in [1, N]: how many classes each episode has. Classes from `ways` on are absent.
        reduction: ``"mean"`` over the queries of all episodes that are not left out (NaN if there are none),
            ``"sum"``, or ``"none"``, which is 0 for a query that is left out.

    Returns:
        [], or [..., Q] with ``reduction="none"``, in the dtype of `support`. No [Q, N, D] is ever held.

    Raises:
        ValueError: a class that is not absent has no example, or a label is out of range (CPU).

    Equivalent to::

        logits = -torch.cdist(query, prototypes(support, support_labels, num_classes)) ** 2
        F.cross_entropy(logits.movedim(-1, 1), query_labels, ignore_index=-100, reduction=reduction)
    """
    code = reference.reduction_code(reduction)
    return _classify(
        support, support_labels, query, query_labels, ways, num_classes, "prototypical", metric, 1.0, code
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
    """log p(class | query) of Matching Networks (Vinyals et al. 2016, equation 1).

    The attention over the support is softmax(-scale * distance): with cosine, the paper's softmax of cosines.

    Args:
        support: [..., S, D], float.
        support_labels: [..., S], int64, -100 to leave an example out. Every class needs an example.
        query: [..., Q, D], the dtype of `support`.
        num_classes: N.
        metric: as in `pairwise_distance`.
        scale: what the distances are multiplied with, an inverse temperature: a number. One that is learned
            goes into the embeddings; the error of a tensor says how.
        ways: [...], int64 in [1, N]: how many classes each episode has. Classes from `ways` on are absent:
            their log probability is -inf and they get no gradient.

    Returns:
        [..., Q, N], in the dtype of `support`.

    Raises:
        ValueError: a class that is not absent has no example, or a label is out of range (CPU).

    Equivalent to::

        attention = torch.softmax(-scale * pairwise_distance(query, support, metric), -1)     # [..., Q, S]
        torch.log(attention @ F.one_hot(support_labels, num_classes).to(attention))
    """
    _check_scale(scale, metric)
    return _classify(support, support_labels, query, None, ways, num_classes, "matching", metric, scale, 0)


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
    """The loss of Matching Networks, -log p(label | query) (Vinyals et al. 2016, equation 1), fused.

    Args:
        support: [..., S, D], float.
        support_labels: [..., S], int64, -100 to leave an example out. Every class needs an example.
        query: [..., Q, D], the dtype of `support`.
        query_labels: [..., Q], int64, -100 to leave a query out.
        num_classes: N.
        metric: as in `pairwise_distance`.
        scale: what the distances are multiplied with, an inverse temperature: a number. One that is learned
            goes into the embeddings; the error of a tensor says how.
        ways: [...], int64 in [1, N]: how many classes each episode has. Classes from `ways` on are absent.
        reduction: ``"mean"`` over the queries of all episodes that are not left out (NaN if there are none),
            ``"sum"``, or ``"none"``, which is 0 for a query that is left out.

    Returns:
        [], or [..., Q] with ``reduction="none"``, in the dtype of `support`. No [Q, S] is ever held.

    Raises:
        ValueError: a class that is not absent has no example, or a label is out of range (CPU).

    Equivalent to::

        options = {"metric": metric, "scale": scale}
        log_probs = matching_log_probs(support, support_labels, query, num_classes, **options)
        F.nll_loss(log_probs.movedim(-1, 1), query_labels, ignore_index=-100, reduction=reduction)
    """
    _check_scale(scale, metric)
    code = reference.reduction_code(reduction)
    return _classify(
        support, support_labels, query, query_labels, ways, num_classes, "matching", metric, scale, code
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
    """The score of every query with every class by a two-layer relation head (Sung et al. 2018, equation 1).

    The first layer splits, W [q; p] = Wq q + Wp p, so that it runs once per query and once per class, and no
    pair is ever concatenated.

    Args:
        query: [..., Q, D], float.
        prototypes: [..., N, D], the dtype of `query`.
        weight: [H, 2 D], as in `torch.nn.Linear` over the concatenation [query, prototype].
        bias: [H].
        out_weight: [H] or [1, H].
        out_bias: [] or [1].
        activation: ``"relu"`` or ``"tanh"``.

    Returns:
        [..., Q, N], scores in (0, 1), in the dtype of `query`.

    Equivalent to::

        pairs = torch.cat(torch.broadcast_tensors(query.unsqueeze(-2), prototypes.unsqueeze(-3)), -1)
        hidden = act(F.linear(pairs, weight, bias))
        torch.sigmoid(F.linear(hidden, out_weight.reshape(1, -1), out_bias.reshape(1))).squeeze(-1)
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected 'relu' or 'tanh', got {activation!r}")
    given = query, prototypes, weight, bias, out_weight, out_bias
    try:
        if doors.is_eager() and _C.relation_agrees(*given) and not reference.autocast_enabled(query):
            return doors.call_eager("relation_scores", *given, _ACTIVATIONS[activation])
        _check_relation(*given)
    except Exception:
        head = {"weight": weight, "bias": bias, "out_weight": out_weight, "out_bias": out_bias}
        blame({"query": query, "prototypes": prototypes, **head})
        raise
    tensors = (query, prototypes, weight, bias, out_weight.reshape(-1), out_bias.reshape(1))
    scores = _relation(*tensors, metric=_ACTIVATIONS[activation])
    return scores if reference.autocast_enabled(query) else scores.to(query.dtype)


@reference.float32_under_autocast
def _relation(*tensors: Tensor, metric: str) -> Tensor:
    """The scores; of 16-bit tensors, or under autocast, float32."""
    query, prototypes, weight, bias, out_weight, out_bias = map(reference.wide, tensors)
    features = query.shape[-1]
    if doors.takes_ops():
        of_query, of_class = doors.ops.relation_layer.default(query, prototypes, weight, bias)
    else:  # linear layers go through every transform
        of_query = F.linear(query, weight[:, :features], bias)  # [..., Q, H]
        of_class = F.linear(prototypes, weight[:, features:])  # [..., N, H]
    if query.shape[:-2] != prototypes.shape[:-2]:
        of_query, of_class = _broadcast(query=(of_query, 2), prototypes=(of_class, 2))
    return doors.call(_PAIRWISE, of_query, of_class, out_weight, out_bias, metric)


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")


# How an inverse temperature that is learned reaches the distances through the embeddings.
_SCALED_BY_EMBEDDINGS = {
    "sqeuclidean": "multiply support and query by its square root",
    "euclidean": "multiply support and query by it",
    "cityblock": "multiply support and query by it",
    "cosine": "take metric='dot' of F.normalize(support, dim=-1) and of F.normalize(query, dim=-1) times it",
    "dot": "multiply query by it",
}


def _check_scale(scale: float, metric: str) -> None:
    if isinstance(scale, Tensor):
        advice = _SCALED_BY_EMBEDDINGS.get(metric, "scale the embeddings")
        raise TypeError(
            f"scale: expected a number, got a tensor, whose gradient would be lost; to learn it, {advice} "
            "(scale.item() is its value now)"
        )
    if not isinstance(scale, (float, int)):
        blame(numbers={"scale": scale})
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")


def _check_relation(
    query: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> None:
    """Says in the terms of `relation_scores` what its linear layers would say in theirs."""
    for name, rows in (("query", query), ("prototypes", prototypes)):
        if rows.dim() < 2 or rows.shape[-1] != query.shape[-1]:
            expected = f"[..., {query.shape[-1]}]" if query.dim() >= 2 else "[..., Q, D]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(rows.shape)}")
    hidden, features = weight.shape[:1], query.shape[-1]
    head = {
        "weight": (weight, ((*hidden, 2 * features),)),
        "bias": (bias, (hidden,)),
        "out_weight": (out_weight, (hidden, (1, *hidden))),
        "out_bias": (out_bias, ((), (1,))),
    }
    for name, (tensor, shapes) in head.items():
        if tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    casts = reference.autocast_enabled(query)
    for name, tensor in (("prototypes", prototypes), *((name, tensor) for name, (tensor, _) in head.items())):
        if tensor.device != query.device:
            expected = f"a tensor on the device of query, {query.device}"
            raise ValueError(f"{name}: expected {expected}, got one on {tensor.device}")
        if tensor.dtype != query.dtype and not casts:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}")


def _classify(
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
    _check_metric(metric)
    given = support, support_labels, query, query_labels, ways
    try:
        if torch.compiler.is_compiling() or not _C.leading_dims_agree(*given):
            given = _same_leading(*given)
        return doors.call(_CLASSIFY, *given, num_classes, method, metric, scale, reduction)
    except Exception:
        given = dict(zip(_EPISODE, given, strict=True))
        absent = {name for name in ("query_labels", "ways") if given[name] is None}
        tensors = {name: value for name, value in given.items() if name not in absent}
        blame(tensors, integers={"num_classes": num_classes})
        raise


def _same_leading(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor | None, ways: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of an episode with the same leading dimensions."""
    given = {"support": (support, 2), "support_labels": (support_labels, 1), "query": (query, 2)}
    if query_labels is not None:
        given["query_labels"] = (query_labels, 1)
    if ways is not None:
        given["ways"] = (ways, 0)
    aligned = dict(zip(given, _broadcast(**given), strict=True))
    return (
        aligned["support"],
        aligned["support_labels"],
        aligned["query"],
        aligned.get("query_labels"),
        aligned.get("ways"),
    )


def _broadcast(**tensors: tuple[Tensor, int]) -> list[Tensor]:
    """Broadcasts the leading dimensions of tensors given as name=(tensor, number of its other dimensions)."""
    for name, (tensor, event_dims) in tensors.items():
        if tensor.dim() < event_dims:
            shape = list(tensor.shape)
            raise ValueError(f"{name}: expected {event_dims} dimensions or more, got shape {shape}")
    leading = [tensor.shape[: tensor.dim() - event_dims] for tensor, event_dims in tensors.values()]
    try:
        common = torch.broadcast_shapes(*leading)
    except RuntimeError:
        found = ", ".join(f"{name} {list(sizes)}" for name, sizes in zip(tensors, leading, strict=True))
        raise ValueError(f"leading dimensions: expected sizes that broadcast, got {found}") from None
    return [
        tensor.expand((*common, *tensor.shape[tensor.dim() - event_dims :]))
        for tensor, event_dims in tensors.values()
    ]


# --- what the second door (_dispatch/doors.py) needs to know about the ops ------------------------------


def _reduced_outside(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """classify with a loss for each query, reduced by torch: a vmapped episode then has a loss of its own."""

    def classify(*args: Any) -> Tensor:
        *rest, reduction = args
        query_labels = rest[3]
        out = function(*rest, 0)
        return out if query_labels is None else reference.reduce_nll(out, query_labels, reduction)

    return classify


_PROTOTYPES = Chain(
    ops=(
        Op("prototypes", ("embeddings", "labels", "num_classes"), ("out",)),
        Op("prototypes_backward", ("grad", "labels"), ("grad_embeddings",), carries=("num_classes",)),
        Op("prototypes", ("gg_embeddings", "labels", "num_classes"), ("grad_grad",)),
    ),
    reference=reference.prototypes,
    event_dims={"embeddings": 2, "labels": 1, "out": 2},
)

_PAIR = ("x", "y", "weight", "bias")
_GRAD_PAIR = ("grad_x", "grad_y", "grad_weight", "grad_bias")
_PAIRWISE = Chain(
    ops=(
        Op("pairwise", (*_PAIR, "metric"), ("out",)),
        Op("pairwise_backward", ("grad", *_PAIR, "out", "metric"), _GRAD_PAIR),
        Op(
            "pairwise_double_backward",
            ("gg_x", "gg_y", "gg_weight", "gg_bias", "grad", *_PAIR, "out", "metric"),
            ("grad_grad", *_GRAD_PAIR),
        ),
    ),
    reference=reference.pairwise,
    event_dims={"x": 2, "y": 2, "out": 2},
    wrap=reference.float32_under_autocast,
)

_EPISODE = ("support", "support_labels", "query", "query_labels", "ways")
_OPTIONS = ("num_classes", "method", "metric", "scale", "reduction")
_SAVED = (*_EPISODE, "rows", "valid", *_OPTIONS)
_CLASSIFY = Chain(
    ops=(
        Op("classify", (*_EPISODE, *_OPTIONS), ("out", "rows", "valid")),
        Op("classify_backward", ("grad", *_SAVED), ("grad_support", "grad_query")),
        Op(
            "classify_double_backward",
            ("gg_support", "gg_query", "grad", *_SAVED),
            ("grad_grad", "grad_support", "grad_query"),
        ),
    ),
    reference=reference.classify,
    # out is [..., Q, N] or the loss of each query, [..., Q]; rows are prototypes, or of size 0 with matching.
    event_dims={
        "support": 2,
        "support_labels": 1,
        "query": 2,
        "query_labels": 1,
        "ways": 0,
        "rows": 2,
        "out": 1,
    },
    wrap=lambda function: reference.float32_under_autocast(_reduced_outside(function)),
)
