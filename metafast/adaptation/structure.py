"""Which modules the fused inner loops know: an MLP or a convolutional network, behind a body that does not
adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from metafast.adaptation import convolutional, tracing
from metafast.adaptation.chain import Known, add_params, addition, layer_name, layers
from metafast.adaptation.convolutional import ConvNet
from metafast.adaptation.tracing import Layers

_MAX_LAYERS = 8
_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}

# What a body may hold: modules that give the same for the same input, however often they run, and keep
# nothing. An inner loop runs the body at each of its steps; the fused one, once.
_REPEATABLE = (
    nn.Sequential,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_REPEATABLE_IN_EVAL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mlp(Known):
    """Its parameters are W1, b1, ..., WL, bL."""

    activation: str

    op: ClassVar[str] = "inner_sgd"
    example: ClassVar[str] = "D"

    @property
    def layers(self) -> list[int]:
        return [i // 2 for i in range(len(self.params))]

    def __str__(self) -> str:
        weights = list(self.params.values())[::2]
        widths = "-".join(str(n) for n in (weights[0].shape[1], *(w.shape[0] for w in weights)))
        activation = f", {self.activation}" if len(weights) > 1 else ""
        return f"Linear {widths}{activation}{self.behind()}"


def recognise(module: nn.Module, adapted: set[str], x: Tensor | None) -> Mlp | ConvNet | str:
    """The module as a network whose parameters of these names adapt, or what the kernels do not know in it.

    Args:
        x: [T, S, ...]; with it, a module of the caller's own is recognised by what its forward runs.
    """
    if _has_any_global_hook():
        return "torch has hooks for all modules"
    found, own, signature = list(layers(module, "")), not type(module).__module__.startswith("torch."), None
    if own and not any(addition(part) for part in module.modules()):
        traced = tracing.layers_of(module, x)
        if isinstance(traced, str):
            return f"{layer_name('', module)} is no nn.Sequential, and {traced}"
        found, signature = traced
    owners = [_adapts(name, layer, adapted) for name, layer in found]
    if True not in owners:
        return "none of its parameters adapts"
    first = owners.index(True)
    body, head = found[:first], found[first:]
    for name, layer in body:
        for part in layer.modules():
            known = type(part) in _REPEATABLE or (type(part) in _REPEATABLE_IN_EVAL and not part.training)
            if not known or addition(part):
                return f"{layer_name(name, layer)} stands before what adapts, and may not give the same twice"
    for name, layer in head:
        if added := addition(layer):
            return f"{layer_name(name, layer)} has {added}"
    head = [(name, layer) for name, layer in head if type(layer) is not nn.Identity]
    convolves = type(head[0][1]) is nn.Conv2d
    parts = convolutional.parse(head, adapted) if convolves else _parse(head, adapted)
    if isinstance(parts, str):
        return parts
    return (ConvNet if convolves else Mlp)(
        body=nn.Sequential(*(m for _, m in body)),
        own=module if own else None,
        signature=signature,
        **parts,
    )


def _adapts(name: str, layer: nn.Module, adapted: set[str]) -> bool:
    """Does a parameter of the layer adapt?"""
    params = dict(layer.named_parameters()) if layer._modules else layer._parameters
    return any(f"{name}{param}" in adapted for param in params)


def _parse(head: Layers, adapted: set[str]) -> dict[str, Any] | str:
    """What an `Mlp` has besides its body; or what is no MLP."""
    params: dict[str, nn.Parameter] = {}
    activations: list[str] = []
    pending = "none"  # the activation since the last Linear
    for name, layer in head:
        if type(layer) in _ACTIVATIONS and params and pending == "none":
            pending = _ACTIVATIONS[type(layer)]
        elif type(layer) is nn.Linear:
            if params:
                activations.append(pending)
            pending = "none"
            if layer.bias is None:
                return f"{layer_name(name, layer)} has no bias"
            if problem := add_params(params, name, layer, ("weight", "bias"), adapted):
                return problem
        else:
            return f"{layer_name(name, layer)} is no Linear, nor a single ReLU, Tanh or Identity between two"
    if pending != "none":
        return f"{layer_name(*head[-1])} follows the last Linear"
    if len(set(activations)) > 1:
        return f"its activations differ: {', '.join(activations)}"
    if len(params) > 2 * _MAX_LAYERS:
        return f"it has {len(params) // 2} Linear layers, more than {_MAX_LAYERS}"
    return {"params": params, "activation": activations[0] if activations else "none"}
