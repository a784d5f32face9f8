"""The path "fused": an MLP by `metafast.inner_sgd`, a convolutional network by `metafast.conv_inner_sgd`,
behind a body that does not adapt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.adaptation.inner_loop import InnerLoop, LearningRates
from metafast.adaptation.states import State
from metafast.adaptation.structure import ConvNet, Mlp
from metafast.ops.convolutional import conv_forward, conv_inner_sgd
from metafast.ops.inner_loop import inner_sgd, task_linear


def train(
    known: Mlp | ConvNet,
    start: State,
    inner: InnerLoop,
    rates: LearningRates,
    features: Tensor,
    y: Tensor,
    weights: Tensor | None,
) -> State:
    """The parameters and the buffers of the tasks after all steps; `features` is what the body makes of x.

    Args:
        start: The parameters, shared by the tasks or [T, ...], and the buffers, [T, ...].
        features, y, weights: [T, S, ...], or [K, T, S, ...] where each step has its own; weights of examples,
            or None.
    """
    params, buffers = start
    name, weight = next(iter(known.params.items()))
    if features.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"x: expected the dtype of {name}, {weight.dtype}, got {features.dtype}")
    weights = None if weights is None else weights.to(weight.dtype)
    found, statistics = _steps(
        known, [params[name] for name in known.params], inner, rates, features, y, weights
    )
    if isinstance(known, ConvNet):
        buffers = known.buffers(buffers, statistics, features[0] if inner.per_step else features)
    return dict(zip(known.params, found, strict=True)), buffers


def _steps(
    known: Mlp | ConvNet,
    params: list[Tensor],
    inner: InnerLoop,
    rates: LearningRates,
    features: Tensor,
    y: Tensor,
    weights: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The parameters, each [T, ...], and what a `ConvNet`'s norms saw: in one call, or where the kernels take
    no more than one step of such examples or rates, in one for each step."""
    run = _conv if isinstance(known, ConvNet) else _mlp
    lr = rates.for_kernels(known.params, known.layers)
    of_step = isinstance(lr, list) and isinstance(lr[0], list)
    if not (of_step or inner.per_step):
        return run(known, params, inner, features, y, weights, lr, inner.steps)
    layered = isinstance(lr, Tensor) and lr.dim() > 0
    seen = []
    for step in range(inner.steps):  # without momentum a step does not know of the one before
        given = (features, y, weights)
        if inner.per_step:
            given = (None if part is None else part[step] for part in given)
        rate = lr[step] if of_step else lr[step : step + 1] if layered else lr
        params, statistics = run(known, params, inner, *given, rate, 1)
        seen.append(statistics)
    return params, torch.cat(seen) if isinstance(known, ConvNet) else None


def _mlp(
    mlp: Mlp,
    params: list[Tensor],
    inner: InnerLoop,
    features: Tensor,
    y: Tensor,
    weights: Tensor | None,
    lr: float | Tensor | list[Tensor],
    steps: int,
) -> tuple[list[Tensor], None]:
    name, weight = next(iter(mlp.params.items()))
    if features.shape[-1] != weight.shape[1]:
        shapes = f"{list(weight.shape)}, got {list(features.shape)}"
        raise ValueError(f"x: expected examples of as many features as {name} takes, {shapes}")
    moved = inner_sgd(
        params,
        features,
        y,
        loss=inner.loss,
        lr=lr,
        steps=steps,
        activation=mlp.activation,
        momentum=inner.momentum,
        first_order=inner.first_order,
        example_weights=weights,
    )
    return moved, None


def _conv(
    net: ConvNet,
    params: list[Tensor],
    inner: InnerLoop,
    features: Tensor,
    y: Tensor,
    weights: Tensor | None,
    lr: float | Tensor | list[Tensor],
    steps: int,
) -> tuple[list[Tensor], Tensor]:
    net.check(features)
    return conv_inner_sgd(
        net.blocks,
        params,
        features,
        y,
        loss=inner.loss,
        lr=lr,
        steps=steps,
        momentum=inner.momentum,
        first_order=inner.first_order,
        example_weights=weights,
    )


def call(known: Mlp | ConvNet, state: State, x: Tensor) -> Tensor:
    """The outputs of the tasks, [T, Q, O]."""
    params, buffers = state
    x = known.features(x)
    if isinstance(known, ConvNet):
        known.check(x)
        return conv_forward(*known.folded(params, buffers), x)
    theta = [params[name] for name in known.params]
    activation = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}[known.activation]
    for i in range(0, len(theta), 2):
        x = task_linear(activation(x) if i else x, theta[i], theta[i + 1])
    return x
