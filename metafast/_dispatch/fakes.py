"""Shapes and dtypes of every op's results without computing them, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast._dispatch import conv_shapes


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _gradient(like: Tensor) -> Tensor:
    """Results are dense, whatever the strides of the argument that they are the gradient of."""
    return like.new_empty(like.shape)


def _prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return embeddings.new_empty(*embeddings.shape[:-2], num_classes, embeddings.shape[-1])


def _prototypes_backward(grad: Tensor, labels: Tensor) -> Tensor:
    return grad.new_empty(*labels.shape, grad.shape[-1])


def _pairwise(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-2])


def _pairwise_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, metric: str
) -> tuple[Tensor, ...]:
    of_shared = (x.new_empty(0 if shared is None else shared.shape) for shared in (weight, bias))
    return _gradient(x), _gradient(y), *of_shared


def _pairwise_double_backward(
    gg_x: Tensor, gg_y: Tensor, gg_weight: Tensor | None, gg_bias: Tensor | None, grad: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return _gradient(grad), *_pairwise_backward(grad, *args)


def _relation_layer(query: Tensor, prototypes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    of_query, of_class = (rows.new_empty(*rows.shape[:-1], bias.shape[0]) for rows in (query, prototypes))
    return of_query, of_class


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
) -> tuple[Tensor, Tensor, Tensor]:
    if query_labels is None:
        sizes = (*query.shape[:-1], num_classes)
    else:
        sizes = () if reduction else query.shape[:-1]
    kept = {"dtype": _compute_dtype(support)}
    rows = (*support.shape[:-2], num_classes, support.shape[-1]) if method == "prototypical" else (0,)
    return (
        support.new_empty(sizes),
        support.new_empty(rows, **kept),
        support.new_empty(min(reduction, 1), **kept),
    )


def _classify_with_gradients(
    support: Tensor, support_labels: Tensor, query: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    kept = {"dtype": _compute_dtype(support)}
    grads = (tensor.new_empty(tensor.shape, **kept) for tensor in (support, query))
    return *_classify(support, support_labels, query, *args), *grads


def _classify_backward(
    grad: Tensor, support: Tensor, support_labels: Tensor, query: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return _gradient(support), _gradient(query)


def _classify_double_backward(
    gg_support: Tensor, gg_query: Tensor, grad: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient(grad), _gradient(gg_support), _gradient(gg_query)


def _inner_sgd(params: Sequence[Tensor], x: Tensor, *args: Any) -> list[Tensor]:
    shared = params[0].dim() == 2
    return [x.new_empty(x.shape[0], *(p.shape if shared else p.shape[1:])) for p in params]


def _wanted_gradients(
    params: Sequence[Tensor], lr: Sequence[Tensor], data: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """Of size 0 where not wanted or given, and for labels. `wanted` are params, lr, and each of the data."""
    flags = [*[wanted[0]] * len(params), *[wanted[1]] * len(lr), *wanted[2:]]
    return [
        params[0].new_empty(tensor.shape if flag and tensor is not None and tensor.is_floating_point() else 0)
        for tensor, flag in zip((*params, *lr, *data), flags, strict=True)
    ]


def _inner_sgd_backward(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    lr: Sequence[Tensor],
    example_weights: Tensor | None,
    *args: Any,
) -> list[Tensor]:
    *_, wanted = args
    return _wanted_gradients(params, lr, (x, y, example_weights), wanted)


def _maml_loss(params: Sequence[Tensor], support_x: Tensor, *args: Any) -> Tensor:
    *_, mean = args
    return support_x.new_empty(() if mean else support_x.shape[0])


def _maml_loss_backward(
    grad: Tensor,
    params: Sequence[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    lr: Sequence[Tensor],
    step_weights: Tensor | None,
    support_weights: Tensor | None,
    query_weights: Tensor | None,
    *args: Any,
) -> tuple[Tensor, list[Tensor]]:
    *_, wanted = args
    data = (support_x, support_y, query_x, query_y, step_weights, support_weights, query_weights)
    # The loss has the shape of its gradient.
    return _gradient(grad), _wanted_gradients(params, lr, data, wanted)


def _conv_inner_sgd(
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    lr: Sequence[Tensor],
    example_weights: Tensor | None,
    network: Sequence[int],
    eps: Sequence[float],
    loss: str,
    steps: int,
    *args: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    *_, keep = args
    blocks, tasks = conv_shapes.blocks_of(network, params, x), x.shape[0]
    shared = params[0].dim() == (4 if network[0] else 2)
    adapted = [x.new_empty(tasks, *(p.shape if shared else p.shape[1:])) for p in params]
    statistics = x.new_empty(steps, 2, tasks, sum(block.width for block in blocks if block.norm))
    kept = (keep, steps, tasks, sum(block.packed for block in blocks)) if keep else (0,)
    return adapted, statistics, x.new_empty(kept)


def _conv_forward(
    params: Sequence[Tensor], x: Tensor, network: Sequence[int], eps: Sequence[float], *args: Any
) -> tuple[Tensor, Tensor]:
    product_dtype, keep = args
    blocks = conv_shapes.blocks_of(network, params, x)
    in_pairs = product_dtype == torch.bfloat16 and x.dtype == torch.float32
    kept = conv_shapes.activations(blocks, *x.shape[:2], in_pairs) if keep else 0
    return x.new_empty(*x.shape[:2], blocks[-1].width), x.new_empty(kept)


def _conv_forward_backward(grad: Tensor, params: Sequence[Tensor], x: Tensor, *args: Any) -> list[Tensor]:
    *_, (of_params, of_x) = args
    return _wanted_gradients(params, [], [x], [of_params, False, of_x])


def _task_conv2d_maps(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    pixels = (
        (size + 2 * around - kernel) // step + 1
        for size, kernel, step, around in zip(x.shape[3:], weight.shape[3:], stride, padding, strict=True)
    )
    return x.new_empty(*x.shape[:2], weight.shape[1], *pixels)


def _task_conv2d_images(grad: Tensor, weight: Tensor, size: Sequence[int], *args: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:2], weight.shape[2], *size)


def _task_conv2d_weight(x: Tensor, grad: Tensor, size: Sequence[int], *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], grad.shape[2], x.shape[2], *size)


def _sgd_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    return [_gradient(p) for p in params], [_gradient(p) for p in params] if momentum else []


def _lstm_unroll(
    grads: Sequence[Tensor], params: Sequence[Tensor], losses: Tensor | None, state: Tensor, *args: Any
) -> tuple[list[Tensor], Tensor]:
    return [_gradient(g) for g in grads], _gradient(state)


def _lstm_unroll_backward(
    grad_out: Sequence[Tensor],
    grad_state: Tensor | None,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    losses: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    *args: Any,
) -> list[Tensor]:
    *_, wanted = args
    groups = (grads, params, [] if losses is None else [losses], [state], weights)
    return [
        tensor.new_empty(tensor.shape if flag else 0)
        for group, flag in zip(groups, wanted, strict=True)
        for tensor in group
    ]


def _lstm_step_(*args: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "prototypes": _prototypes,
    "prototypes_backward": _prototypes_backward,
    "pairwise": _pairwise,
    "pairwise_backward": _pairwise_backward,
    "pairwise_double_backward": _pairwise_double_backward,
    "relation_layer": _relation_layer,
    "classify": _classify,
    "classify_with_gradients": _classify_with_gradients,
    "classify_backward": _classify_backward,
    "classify_double_backward": _classify_double_backward,
    "inner_sgd": _inner_sgd,
    "inner_sgd_backward": _inner_sgd_backward,
    "maml_loss": _maml_loss,
    "maml_loss_backward": _maml_loss_backward,
    "sgd_update": _sgd_update,
    "conv_inner_sgd": _conv_inner_sgd,
    "conv_inner_sgd_backward": _inner_sgd_backward,
    "conv_forward": _conv_forward,
    "conv_forward_backward": _conv_forward_backward,
    "task_conv2d_maps": _task_conv2d_maps,
    "task_conv2d_images": _task_conv2d_images,
    "task_conv2d_weight": _task_conv2d_weight,
    "lstm_unroll": _lstm_unroll,
    "lstm_unroll_backward": _lstm_unroll_backward,
    "lstm_step_": _lstm_step_,
}


def _tensors(names: Sequence[str], args: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments and in their lists, by the name that an error gives them."""
    for name, arg in zip(names, args, strict=True):
        if isinstance(arg, Tensor):
            yield name, arg
        elif isinstance(arg, (list, tuple)):
            members = [f"{name}[{i}]" for i in range(len(arg))] if len(arg) > 1 else [name] * len(arg)
            yield from _tensors(members, arg)


def _on_one_device(schema: torch.FunctionSchema, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel behind a check that the real ones make too: a call with a meta tensor ends here."""

    names = [argument.name for argument in schema.arguments]

    def checked(*args: Any) -> Any:
        renamed = {}
        if "gates" in args:  # the meta-LSTM, whose functions call two of the optimizers' arguments otherwise
            given = dict(zip(names, args, strict=False))
            renamed = {"params": "theta"} | ({} if given.get("unrolled", False) else {"losses": "loss"})
        (first, like), *others = _tensors([renamed.get(name, name) for name in names], args)
        for name, tensor in others:
            if tensor.device != like.device:
                raise ValueError(
                    f"{name}: expected a tensor on the device of {first}, {like.device}, "
                    f"got one on {tensor.device}"
                )
        return fake(*args)

    return checked


def register(namespace: str) -> None:
    """Gives every op of the namespace its fake kernel."""
    for name, fake in _FAKES.items():
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        torch.library.register_fake(f"{namespace}::{name}", _on_one_device(schema, fake))
