"""The networks of the methods that adapt: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from metafast._dispatch.arguments import check_choice, check_count, check_instance

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu") -> nn.Sequential:
    """[..., ``inputs``] -> [..., ``outputs``] through hidden layers of these widths.

    Weights are normal with the variance that keeps the activations' (He et al. 2015, Glorot and Bengio 2010),
    biases zero.
    """
    check_choice(_ACTIVATIONS, activation=activation)
    check_instance(Sequence, hidden=hidden)
    check_count(
        1, inputs=inputs, **{f"hidden[{i}]": width for i, width in enumerate(hidden)}, outputs=outputs
    )
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
