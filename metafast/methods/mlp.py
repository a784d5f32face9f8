"""The networks of the methods that adapt: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu") -> nn.Sequential:
    """[..., ``inputs``] -> [..., ``outputs``] through hidden layers of these widths.

    Weights are normal with the variance that keeps the activations' (He et al. 2015, Glorot and Bengio 2010),
    biases zero.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(_ACTIVATIONS)}, got {activation!r}")
    layers: list[nn.Module] = []
    widths = [inputs, *hidden, outputs]
    for i, o in pairwise(widths):
        linear = nn.Linear(i, o)
        if activation == "relu":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
