"""Small networks as functions of their parameters, T of them at a time: what learned optimizers train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.ops.convolutional import task_conv2d
from metafast.ops.inner_loop import task_linear


@dataclass(frozen=True, eq=False)
class Network:
    """T networks of one architecture.

    Attributes:
        parameters: the shape of each parameter, and the bound of its uniform initialisation, as in torch's
            own layers: 1 / sqrt(number of inputs).
        forward: parameters, each [T, ...], and examples [T, B, ...] -> logits [T, B, N].
    """

    parameters: tuple[tuple[torch.Size, float], ...]
    forward: Callable[[Sequence[Tensor], Tensor], Tensor]

    def __call__(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.forward(params, x)


def sigmoid_mlp(inputs: int, hidden: Sequence[int], outputs: int) -> Network:
    """An MLP with sigmoids between layers, on flattened examples (Andrychowicz et al. 2016, section 3.2)."""
    widths = [inputs, *hidden, outputs]

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        x = x.flatten(2)
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = task_linear(x, weight, bias).sigmoid()
        return task_linear(x, *params[-2:])

    layers = [_layer((o, i), inputs=i) for i, o in pairwise(widths)]
    return Network(tuple(parameter for layer in layers for parameter in layer), forward)


def relu_cnn(side: int, channels: Sequence[int], outputs: int) -> Network:
    """Convolutions 3 x 3 with ReLU, each halved by max pooling, on images of one channel; a linear layer."""
    widths = [1, *channels]

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = task_conv2d(x, weight, bias, padding=1).relu()
            x = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        return task_linear(x.flatten(2), *params[-2:])

    layers = [_layer((o, i, 3, 3), inputs=9 * i) for i, o in pairwise(widths)]
    left = channels[-1] * (side >> len(channels)) ** 2
    layers.append(_layer((outputs, left), inputs=left))
    return Network(tuple(parameter for layer in layers for parameter in layer), forward)


def elman_rnn(inputs: int, hidden: int, outputs: int) -> Network:
    """A tanh RNN that reads an image row by row; a linear layer on its last state."""

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        of_rows, of_state, bias, head, head_bias = params
        none = torch.zeros_like(bias)
        state = x.new_zeros(*x.shape[:2], hidden)
        for row in x.flatten(2, 3).unbind(2):  # [T, B, 1, rows, inputs]
            state = (task_linear(row, of_rows, bias) + task_linear(state, of_state, none)).tanh()
        return task_linear(state, head, head_bias)

    bound = hidden**-0.5
    shapes = [(hidden, inputs), (hidden, hidden), (hidden,), (outputs, hidden), (outputs,)]
    return Network(tuple((torch.Size(shape), bound) for shape in shapes), forward)


def _layer(shape: tuple[int, ...], *, inputs: int) -> tuple[tuple[torch.Size, float], ...]:
    bound = inputs**-0.5
    return (torch.Size(shape), bound), (torch.Size(shape[:1]), bound)
