"""The operations that the contract (test_contract.py) is checked for. A new operation adds a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

WAY = 3
HIDDEN = (7, 8)  # of the inner loop's networks


@dataclass(frozen=True)
class Sizes:
    """All different, and not WAY or HIDDEN, so that dimensions that are mixed up do not fit."""

    tasks: int = 2
    support: int = 6
    query: int = 4
    features: int = 5


@dataclass(frozen=True)
class Row:
    """An operation with some options, as a function of tensors only."""

    name: str
    call: Callable[[ModuleType], Callable[..., Tensor]]  # of metafast, or of metafast.reference
    make: Callable[[Sizes, Generator], tuple[Tensor, ...]]  # float64 and int64 tensors
    differentiable: tuple[int, ...]  # positions among the tensors
    names: tuple[str, ...]  # what errors call the tensors
    shared: tuple[int, ...] = ()  # positions of tensors without leading dimensions
    op: str = ""  # the registered op
    float32_under_autocast: bool = True
    half: bool = True  # takes 16-bit tensors, also outside autocast
    derivatives: int | None = 2  # how often it is differentiable; None: without end
    kernels: int = 3  # registered ops that a call and its derivatives run
    leading: bool = True  # takes any number of leading dimensions, not just one of tasks
    labels: tuple[int, ...] = ()  # positions of labels in [0, WAY)
    complete: tuple[int, ...] = ()  # of those, where each class needs an example
    one_task: bool = False  # the call needs the dimension of tasks, also for a single one
    # How a call comes to its kernels under grad and vmap: fused through the second door, by the reference, or
    # as everywhere ("op").
    transform_door: str = "function"
    # Of torch's library, where it computes the row: torch.backends.<library>.fp32_precision is what float32
    # means on a GPU.
    library: str = ""

    def __str__(self) -> str:
        return self.name

    def of_task(self, module: ModuleType) -> Callable[..., Tensor]:
        """The operation for the tensors of one task, as a vmap over tasks has it."""
        function = self.call(module)
        if not self.one_task:
            return function
        return lambda *args: function(
            *(arg if i in self.shared else arg.unsqueeze(0) for i, arg in enumerate(args))
        )

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
        ("x", "y"),
        op="pairwise",
    )


def _weighted(metric: str) -> Row:
    return Row(
        f"pairwise_distance[{metric}, weight]",
        lambda m: lambda x, y, weight: m.pairwise_distance(x, y, metric, weight=weight),
        _weighted_pair,
        (0, 1, 2),
        ("x", "y", "weight"),
        shared=(2,),
        op="pairwise",
    )


EPISODE = ("support", "support_labels", "query", "query_labels", "ways")


def _log_probs(name: str, metric: str) -> Row:
    return Row(
        f"{name}[{metric}]",
        lambda m: lambda s, sl, q: getattr(m, name)(s, sl, q, WAY, metric=metric),
        _unlabelled,
        (0, 2),
        EPISODE[:3],
        op="classify",
        labels=(1,),
        complete=(1,),
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
        EPISODE[:4],
        op="classify",
        labels=(1, 3),
        complete=(1,),
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
        EPISODE,
        op="classify",
        labels=(1, 3),
        complete=(1,),
    )


def _scores(activation: str) -> Row:
    return Row(
        f"relation_scores[{activation}]",
        lambda m: lambda *tensors: m.relation_scores(*tensors, activation=activation),
        _relation,
        (0, 1, 2, 3, 4, 5),
        ("query", "prototypes", "weight", "bias", "out_weight", "out_bias"),
        shared=(2, 3, 4, 5),
        op="pairwise",
    )


STEPS = 2
PARAMETERS = 2 * (len(HIDDEN) + 1)


def _networks(sizes: Sizes, g: Generator, *, shared: bool) -> tuple[Tensor, ...]:
    """W1, b1, ..., WL, bL of networks with an output for each class, and lr [K, L]."""
    lead = () if shared else (sizes.tasks,)
    widths = (sizes.features, *HIDDEN, WAY)
    params = []
    for inputs, outputs in itertools.pairwise(widths):
        weight = torch.randn(*lead, outputs, inputs, dtype=torch.float64, generator=g)
        params += [weight / max(inputs, 1) ** 0.5]
        params += [torch.randn(*lead, outputs, dtype=torch.float64, generator=g)]
    return *params, torch.rand(STEPS, len(widths) - 1, dtype=torch.float64, generator=g) / 10


def _targets(sizes: Sizes, count: int, g: Generator, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return labels(sizes, count, g)
    return torch.randn(sizes.tasks, count, WAY, dtype=torch.float64, generator=g)


def _examples(sizes: Sizes, g: Generator, loss: str, *counts: int) -> tuple[Tensor, ...]:
    sets = ((embeddings(sizes, count, g), _targets(sizes, count, g, loss)) for count in counts)
    return tuple(tensor for examples in sets for tensor in examples)


def _inner_loop(
    op: str,
    name: str,
    data: tuple[str, ...],
    weights: tuple[str, ...],
    call: Callable,
    *,
    shared: bool,
    loss: str,
) -> Row:
    """An op of networks' parameters, learning rates, these examples, inputs and targets by turns, and
    their weights."""

    def make(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
        counts = (sizes.support, sizes.query)[: len(data) // 2]
        examples = _examples(sizes, g, loss, *counts)
        weighs = (
            torch.rand(sizes.tasks, n, dtype=torch.float64, generator=g) + 0.1 for n in counts[: len(weights)]
        )
        return *_networks(sizes, g, shared=shared), *examples, *weighs

    given = PARAMETERS + 1  # before the data
    targets = tuple(range(given + 1, given + len(data), 2))
    labels = targets if loss == "cross_entropy" else ()
    return Row(
        f"{op}[{name}]",
        call,
        make,
        tuple(i for i in range(given + len(data) + len(weights)) if i not in labels),
        (*(f"params[{i}]" for i in range(PARAMETERS)), "lr", *data, *weights),
        shared=tuple(range(given)) if shared else (PARAMETERS,),
        op=op,
        half=False,
        derivatives=1,
        kernels=2,
        leading=False,
        labels=labels,
        one_task=True,
    )


def _maml_loss(
    name: str,
    *,
    loss: str,
    reduction: str = "mean",
    shared: bool = False,
    weighted: bool = False,
    **options: object,
) -> Row:
    options = {"activation": "tanh", "loss": loss, "steps": STEPS, "reduction": reduction, **options}

    def call(m: ModuleType) -> Callable[..., Tensor]:
        def query_loss(*tensors: Tensor) -> Tensor:
            params, (lr, *examples) = tensors[:PARAMETERS], tensors[PARAMETERS:]
            given = dict(zip(weights, examples[len(data) :], strict=True))
            return m.maml_loss(params, *examples[: len(data)], lr=lr, **given, **options)

        return query_loss

    data = ("support_x", "support_y", "query_x", "query_y")
    weights = ("support_weights", "query_weights") if weighted else ()
    return _inner_loop("maml_loss", name, data, weights, call, shared=shared, loss=loss)


def _inner_sgd(
    name: str, *, loss: str, shared: bool = False, weighted: bool = False, **options: object
) -> Row:
    """The adapted parameters in one tensor, [T, P]."""
    options = {"activation": "tanh", "loss": loss, "steps": STEPS, **options}

    def call(m: ModuleType) -> Callable[..., Tensor]:
        def adapted(*tensors: Tensor) -> Tensor:
            params, (lr, x, y, *examples) = tensors[:PARAMETERS], tensors[PARAMETERS:]
            found = m.inner_sgd(params, x, y, lr=lr, **dict(zip(weights, examples, strict=True)), **options)
            return torch.cat([parameter.flatten(1) for parameter in found], 1)

        return adapted

    weights = ("example_weights",) if weighted else ()
    return _inner_loop("inner_sgd", name, ("x", "y"), weights, call, shared=shared, loss=loss)


CHANNELS = 4  # of the convolutional networks


def _conv_network(m: ModuleType, shape: str) -> list[Any]:
    """A block and a linear layer; each kind has other options."""
    if shape == "pooled":
        pool = {"pool": "max", "pool_kernel": 2, "pool_stride": 2}
        return [m.ConvBlock(3, padding=1, norm=True, activation="tanh", **pool), m.ConvBlock(None)]
    pool = {"pool": "average", "pool_kernel": (2, 1), "pool_padding": (1, 0), "pools_first": True}
    return [m.ConvBlock((3, 2), (2, 1), (1, 0), activation="tanh", **pool), m.ConvBlock(None)]


def _conv_params(sizes: Sizes, g: Generator, shape: str, *, shared: bool) -> tuple[Tensor, ...]:
    """The parameters of the network, for images of `_images`."""
    lead = () if shared else (sizes.tasks,)
    columns = 4 + sizes.features % 3
    if shape == "pooled":
        kernel, vectors, pixels = (3, 3), 3, 2 * (columns // 2)
    else:
        kernel, vectors, pixels = (3, 2), 1, 4 * (columns - 1)
    shapes = (CHANNELS, 2, *kernel), *[(CHANNELS,)] * vectors, (WAY, CHANNELS * pixels), (WAY,)
    return tuple(torch.randn(*lead, *of, dtype=torch.float64, generator=g) / 2 for of in shapes)


def _images(sizes: Sizes, count: int, g: Generator) -> Tensor:
    columns = 4 + sizes.features % 3
    return torch.randn(sizes.tasks, count, 2, 5, columns, dtype=torch.float64, generator=g)


def _conv_inner_sgd(
    name: str, shape: str, *, loss: str, shared: bool = False, weighted: bool = False, **options: object
) -> Row:
    """The adapted parameters in one tensor, [T, P]."""
    options = {"loss": loss, "steps": STEPS, **options}
    count = 6 if shape == "pooled" else 4

    def make(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
        lr = torch.rand(STEPS, 2, dtype=torch.float64, generator=g) / 10
        data = _images(sizes, sizes.support, g), _targets(sizes, sizes.support, g, loss)
        weights = torch.rand(sizes.tasks, sizes.support, dtype=torch.float64, generator=g) + 0.1
        given = (lr, *data, weights) if weighted else (lr, *data)
        return *_conv_params(sizes, g, shape, shared=shared), *given

    def call(m: ModuleType) -> Callable[..., Tensor]:
        def adapted(*tensors: Tensor) -> Tensor:
            params, (lr, x, y, *rest) = tensors[:count], tensors[count:]
            weights = dict(zip(names[2:], rest, strict=True))
            found, _ = m.conv_inner_sgd(_conv_network(m, shape), params, x, y, lr=lr, **weights, **options)
            return torch.cat([parameter.flatten(1) for parameter in found], 1)

        return adapted

    names = ("x", "y", "example_weights") if weighted else ("x", "y")
    labels = (count + 2,) if loss == "cross_entropy" else ()
    return Row(
        f"conv_inner_sgd[{name}]",
        call,
        make,
        tuple(i for i in range(count + 1 + len(names)) if i not in labels),
        (*(f"params[{i}]" for i in range(count)), "lr", *names),
        shared=tuple(range(count + 1)) if shared else (count,),
        op="conv_inner_sgd",
        half=False,
        derivatives=1,
        kernels=2,
        leading=False,
        labels=labels,
        one_task=True,
        transform_door="reference",
    )


def _conv_forward(shape: str) -> Row:
    count = 6 if shape == "pooled" else 4

    def make(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
        return *_conv_params(sizes, g, shape, shared=False), _images(sizes, sizes.query, g)

    return Row(
        f"conv_forward[{shape}]",
        lambda m: lambda *tensors: m.conv_forward(_conv_network(m, shape), tensors[:-1], tensors[-1]),
        make,
        tuple(range(count + 1)),
        (*(f"params[{i}]" for i in range(count)), "x"),
        op="conv_forward",
        half=False,
        derivatives=1,
        kernels=2,
        leading=False,
        one_task=True,
        transform_door="reference",
    )


def _update(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    """Two parameters of each task, [S, D] and [D], their gradients, their momentum, and lr [D]."""
    shapes = ((sizes.tasks, sizes.support, sizes.features), (sizes.tasks, sizes.features)) * 3
    tensors = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)
    return *tensors, torch.rand(sizes.features, dtype=torch.float64, generator=g)


def _updated(m: ModuleType) -> Callable[..., Tensor]:
    def update(*tensors: Tensor) -> Tensor:
        params, grads, buffers, (lr,) = (tensors[i : i + 2] for i in range(0, 7, 2))
        options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
        new_params, new_buffers = m.sgd_update(params, grads, [lr, lr], momentum_buffers=buffers, **options)
        return torch.cat(
            [t.unsqueeze(-2) if i % 2 else t for i, t in enumerate(new_params + new_buffers)], -2
        )

    return update


def _layer(
    name: str, library: str, make: Callable[[Sizes, Generator], tuple[Tensor, ...]], *, kernels: int = 0
) -> Row:
    return Row(
        name,
        lambda m: getattr(m, name),
        make,
        (0, 1, 2),
        ("x", "weight", "bias"),
        op=name,
        float32_under_autocast=False,
        derivatives=None,
        kernels=kernels,
        leading=False,
        one_task=True,
        transform_door="op",
        library=library,
    )


def _linear(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    weight = torch.randn(sizes.tasks, WAY, sizes.features, dtype=torch.float64, generator=g)
    bias = torch.randn(sizes.tasks, WAY, dtype=torch.float64, generator=g)
    return embeddings(sizes, sizes.query, g), weight / max(sizes.features, 1) ** 0.5, bias


def _conv2d(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
    channels, pixels = min(sizes.features, 5), (5, 4)
    shapes = (
        (sizes.tasks, min(sizes.query, 8), channels, *pixels),
        (sizes.tasks, WAY, channels, 3, 2),
        (sizes.tasks, WAY),
    )
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes)


UNITS = 3  # of the optimizers' LSTMs


def _optimizer_shapes(sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    return (sizes.support, sizes.features), (sizes.features,)


def _blocks(sizes: Sizes) -> int:
    return sum(-(-torch.Size(shape).numel() // 64) for shape in _optimizer_shapes(sizes))


def _optimizer(
    layers: int, *, gates: bool, steps: int = 0
) -> Callable[[Sizes, Generator], tuple[Tensor, ...]]:
    """Gradients and parameters [S, D] and [D] of each task, state, with gates the losses, and the weights."""

    def make(sizes: Sizes, g: Generator) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        shapes = _optimizer_shapes(sizes)
        rows = 2 * layers * UNITS + 2 * gates
        times = (steps,) if steps else ()
        inputs = 4 if gates else 2
        weights = []
        for layer in range(layers):
            weights += [normal(4 * UNITS, UNITS if layer else inputs), normal(4 * UNITS, UNITS)]
            weights += [normal(4 * UNITS)]
        top = (UNITS if layers else inputs) + 2 * gates
        weights += [normal(1 + gates, top), normal(1 + gates)]
        return (
            *(normal(sizes.tasks, *times, *shape) for shape in shapes),
            *(normal(sizes.tasks, *shape) for shape in shapes),
            0.5 * normal(sizes.tasks, _blocks(sizes), rows, 64),
            *([torch.rand(times, dtype=torch.float64, generator=g)] if gates else []),
            *(0.5 * weight for weight in weights),
        )

    return make


def _optimizer_names(layers: int, *, gates: bool, steps: int) -> tuple[str, ...]:
    """Of the lists with one task; each other has two tensors more."""
    params = "theta" if gates else "params"
    losses = (("losses" if steps else "loss"),) if gates else ()
    weights = (f"weights[{i}]" for i in range(3 * layers + 2))
    return "grads[0]", "grads[1]", f"{params}[0]", f"{params}[1]", "state", *losses, *weights


def _optimizer_row(
    name: str, function: str, layers: int, *, gates: bool, steps: int = 0, **options: str
) -> Row:
    """The lists have the tensors of one task after the other."""

    def call(m: ModuleType) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            tasks = tensors[0].shape[0]
            grads, params = (
                [t for task in itertools.zip_longest(*pair) for t in task if t is not None]
                for pair in (tensors[:2], tensors[2:4])
            )
            state = tensors[4].reshape(-1, *tensors[4].shape[2:])
            if not tasks:
                unused = sum(t.sum() for t in tensors)  # no list of tensors, no call
                return torch.cat([t.flatten(1) for t in tensors[2:5]], 1) + unused
            if gates:
                loss, *weights = tensors[5:]
                out, state = getattr(m, function)(params, grads, loss, state, weights, **options)
            else:
                out, state = getattr(m, function)(grads, state, list(tensors[5:]), params=params, **options)
            rows = [torch.cat([t.flatten() for t in out[i : i + 2]]) for i in range(0, 2 * tasks, 2)]
            return torch.cat((torch.stack(rows), state.unflatten(0, (tasks, -1)).flatten(1)), 1)

        return run

    weights = 5 + gates + 3 * layers + 2
    return Row(
        f"{function}[{name}]",
        call,
        _optimizer(layers, gates=gates, steps=steps),
        tuple(range(weights)),
        _optimizer_names(layers, gates=gates, steps=steps),
        shared=tuple(range(5, weights)),
        op="lstm_unroll",
        half=False,
        derivatives=1,
        kernels=2,
        leading=False,
        one_task=True,
    )


ROWS = (
    Row(
        "prototypes",
        lambda m: lambda embeddings, labels: m.prototypes(embeddings, labels, WAY),
        _support,
        (0,),
        ("embeddings", "labels"),
        op="prototypes",
        float32_under_autocast=False,
        derivatives=None,
        kernels=2,
        labels=(1,),
        complete=(1,),
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
    _maml_loss("mse, shared", shared=True, loss="mse", momentum=0.7),
    _maml_loss("cross_entropy, per task", loss="cross_entropy", reduction="none"),
    _maml_loss("mse, per task", loss="mse", reduction="none", activation="relu"),
    _inner_sgd("mse, per task", loss="mse"),
    _inner_sgd("cross_entropy, shared", shared=True, loss="cross_entropy", momentum=0.5),
    _maml_loss("mse, weighted", shared=True, weighted=True, loss="mse"),
    _maml_loss("cross_entropy, weighted", weighted=True, loss="cross_entropy", reduction="none"),
    _inner_sgd("cross_entropy, weighted", weighted=True, loss="cross_entropy", momentum=0.5),
    _conv_inner_sgd("mse, per task", "pooled", loss="mse", momentum=0.5),
    _conv_inner_sgd("cross_entropy, shared", "strided", loss="cross_entropy", shared=True),
    _conv_inner_sgd("mse, weighted", "strided", loss="mse", weighted=True, momentum=0.5),
    _conv_inner_sgd("cross_entropy, weighted", "pooled", loss="cross_entropy", shared=True, weighted=True),
    _conv_forward("strided"),
    _conv_forward("pooled"),
    Row(
        "sgd_update",
        _updated,
        _update,
        (0, 1, 2, 3, 4, 5, 6),
        (*(f"{kind}[{i}]" for kind in ("params", "grads", "momentum_buffers") for i in range(2)), "lr"),
        shared=(6,),
        op="sgd_update",
        float32_under_autocast=False,
        half=False,
        derivatives=None,
        kernels=1,
        leading=False,
        transform_door="reference",
    ),
    _optimizer_row("2 layers", "lstm_optimizer_step", 2, gates=False),
    _optimizer_row("1 layer", "lstm_optimizer_unroll", 1, gates=False, steps=4),
    _optimizer_row("no layer", "meta_lstm_step", 0, gates=True),
    _optimizer_row("1 layer", "meta_lstm_unroll", 1, gates=True, steps=3),
    _layer("task_linear", "cuda.matmul", _linear),
    _layer("task_conv2d", "cudnn.conv", _conv2d, kernels=3),
)
