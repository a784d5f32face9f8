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
from metafast.reference.convolutional import layers_of


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
        weights: Of examples, [T, S], or None; None for a `ConvNet`.
    """
    params, buffers = start
    name, weight = next(iter(known.params.items()))
    if features.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"x: expected the dtype of {name}, {weight.dtype}, got {features.dtype}")
    given = [params[name] for name in known.params]
    if isinstance(known, Mlp):
        found = _train_mlp(known, given, inner, rates, features, y, weights)
    else:
        known.check(features)
        found, statistics = _train_conv(known, given, inner, rates, features, y)
        buffers = known.buffers(buffers, statistics, features)
    return dict(zip(known.params, found, strict=True)), buffers


def _train_mlp(
    mlp: Mlp,
    params: list[Tensor],
    inner: InnerLoop,
    rates: LearningRates,
    features: Tensor,
    y: Tensor,
    weights: Tensor | None,
) -> list[Tensor]:
    name, weight = next(iter(mlp.params.items()))
    if features.shape[-1] != weight.shape[1]:
        shapes = f"{list(weight.shape)}, got {list(features.shape)}"
        raise ValueError(f"x: expected examples of as many features as {name} takes, {shapes}")
    return inner_sgd(
        params,
        features,
        y,
        loss=inner.loss,
        lr=rates.for_kernels(mlp.params, [i // 2 for i in range(len(params))]),
        steps=inner.steps,
        activation=mlp.activation,
        momentum=inner.momentum,
        first_order=inner.first_order,
        example_weights=None if weights is None else weights.to(weight.dtype),
    )


def _train_conv(
    net: ConvNet, params: list[Tensor], inner: InnerLoop, rates: LearningRates, features: Tensor, y: Tensor
) -> tuple[list[Tensor], Tensor]:
    def steps(
        params: list[Tensor], lr: float | Tensor | list[Tensor], count: int
    ) -> tuple[list[Tensor], Tensor]:
        return conv_inner_sgd(
            net.blocks,
            params,
            features,
            y,
            loss=inner.loss,
            lr=lr,
            steps=count,
            momentum=inner.momentum,
            first_order=inner.first_order,
        )

    lr = rates.for_kernels(net.params, layers_of(net.blocks))
    if not (isinstance(lr, list) and isinstance(lr[0], list)):
        return steps(params, lr, inner.steps)
    statistics = []
    for of_step in lr:  # without momentum a step does not know of the one before
        params, seen = steps(params, of_step, 1)
        statistics.append(seen)
    return params, torch.cat(statistics)


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
