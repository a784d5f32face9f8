"""The networks that the fused inner loop trains: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu") -> nn.Sequential:
    """[..., ``inputs``] -> [..., ``outputs``] through hidden layers of these widths.

    Weights are normal with the variance that keeps the activations' (He et al. 2015, Glorot and Bengio 2010),
    biases zero.
    """
    kinds = {name: kind for kind, name in _ACTIVATIONS.items()}
    if activation not in kinds:
        raise ValueError(f"activation: expected one of {tuple(kinds)}, got {activation!r}")
    layers: list[nn.Module] = []
    widths = [inputs, *hidden, outputs]
    for i, o in pairwise(widths):
        linear = nn.Linear(i, o)
        if activation == "relu":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, kinds[activation]()]
    return nn.Sequential(*layers[:-1])


def read_mlp(network: nn.Module) -> tuple[list[nn.Linear], str]:
    """The linear layers of an MLP, and the activation between them as the fused operations call it.

    Args:
        network: `nn.Sequential` of `nn.Linear` layers with bias, all with the same `nn.ReLU` or `nn.Tanh`
            between them.

    Raises:
        ValueError: the network is anything else.
    """
    modules = list(network) if isinstance(network, nn.Sequential) else [network]
    layers, kinds = modules[::2], {type(module) for module in modules[1::2]}
    if (
        len(modules) % 2 == 0
        or not all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        or len(kinds) > 1
        or not kinds <= _ACTIVATIONS.keys()
    ):
        raise ValueError(
            "network: expected nn.Sequential of nn.Linear layers with bias and the same nn.ReLU or nn.Tanh "
            f"between them, got {network}"
        )
    return layers, _ACTIVATIONS[kinds.pop()] if kinds else "none"
