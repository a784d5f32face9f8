"""The path "fused": an MLP, behind a body that does not adapt, by `metafast.inner_sgd`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.adaptation.inner_loop import InnerLoop, LearningRates
from metafast.adaptation.states import Tensors
from metafast.adaptation.structure import Mlp
from metafast.ops.inner_loop import inner_sgd, task_linear


def train(
    mlp: Mlp, params: Tensors, inner: InnerLoop, rates: LearningRates, features: Tensor, y: Tensor
) -> Tensors:
    """The parameters of the tasks after all steps, [T, ...]; `features` is what the body makes of x."""
    name, weight = next(iter(mlp.params.items()))
    if features.shape[-1] != weight.shape[1]:
        shapes = f"{list(weight.shape)}, got {list(features.shape)}"
        raise ValueError(f"x: expected examples of as many features as {name} takes, {shapes}")
    if features.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"x: expected the dtype of {name}, {weight.dtype}, got {features.dtype}")
    found = inner_sgd(
        list(params.values()),
        features,
        y,
        loss=inner.loss,
        lr=rates.for_kernels(mlp.params),
        steps=inner.steps,
        activation=mlp.activation,
        momentum=inner.momentum,
        first_order=inner.first_order,
    )
    return dict(zip(params, found, strict=True))


def call(mlp: Mlp, params: Tensors, x: Tensor) -> Tensor:
    """The outputs of the tasks, [T, Q, O]."""
    theta = list(params.values())
    activation = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}[mlp.activation]
    x = mlp.features(x)
    for i in range(0, len(theta), 2):
        x = task_linear(activation(x) if i else x, theta[i], theta[i + 1])
    return x
