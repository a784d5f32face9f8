"""Which modules the fused inner loop knows: an MLP, behind a body that does not adapt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from metafast.adaptation import tracing
from metafast.adaptation.scratch import called

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


@dataclass(frozen=True, eq=False)
class Mlp:
    """A module that is a body, which does not adapt, followed by an MLP, all of which does."""

    body: nn.Sequential  # perhaps empty
    params: dict[str, nn.Parameter]  # W1, b1, ..., WL, bL, by their names in the module
    activation: str
    own: nn.Module | None = None  # the caller's, where it was recognised by what its forward runs
    signature: Any = None  # of that, then

    def still(self) -> bool:
        """Does the module run the same layers as when it was recognised?"""
        return self.own is None or tracing.signature(self.own) == self.signature

    def features(self, x: Tensor) -> Tensor:
        """What the body makes of the input: [T, S, ...] -> [T, S, ...]."""
        return torch.vmap(self.body)(x) if len(self.body) else x

    def __str__(self) -> str:
        weights = list(self.params.values())[::2]
        widths = "-".join(str(n) for n in (weights[0].shape[1], *(w.shape[0] for w in weights)))
        activation = f", {self.activation}" if len(weights) > 1 else ""
        body = ", ".join(type(layer).__name__ for layer in self.body)
        body = f", behind what does not adapt ({body})" if body else ""
        own = f", as {type(self.own).__name__}.forward runs" if self.own is not None else ""
        return f"Linear {widths}{activation}{own}{body}"


def recognise(module: nn.Module, adapted: set[str], x: Tensor | None) -> Mlp | str:
    """The module as an MLP whose parameters of these names adapt, or what the kernels do not know in it.

    Args:
        x: [T, S, ...]; with it, a module of the caller's own is recognised by what its forward runs.
    """
    if _has_any_global_hook():
        return "torch has hooks for all modules"
    layers, own = list(_layers(module, "")), not type(module).__module__.startswith("torch.")
    if own and not any(_addition(part) for part in module.modules()):
        found = tracing.layers_of(module, x)
        if isinstance(found, str):
            return f"{_called('', module)} is no nn.Sequential, and {found}"
        layers = found
    owners = [any(f"{name}{p}" in adapted for p, _ in m.named_parameters()) for name, m in layers]
    if True not in owners:
        return "none of its parameters adapts"
    first = owners.index(True)
    body, head = layers[:first], layers[first:]
    for name, layer in body:
        for part in layer.modules():
            known = type(part) in _REPEATABLE or (type(part) in _REPEATABLE_IN_EVAL and not part.training)
            if not known or _addition(part):
                return f"{_called(name, layer)} stands before what adapts, and may not give the same twice"
    params: dict[str, nn.Parameter] = {}
    activations: list[str] = []
    pending = "none"  # the activation since the last Linear
    for name, layer in head:
        if addition := _addition(layer):
            return f"{_called(name, layer)} has {addition}"
        if type(layer) is nn.Identity:
            continue
        if type(layer) in _ACTIVATIONS and params and pending == "none":
            pending = _ACTIVATIONS[type(layer)]
        elif type(layer) is nn.Linear:
            if params:
                activations.append(pending)
            pending = "none"
            problem = _add_linear(params, name, layer, adapted)
            if problem:
                return problem
        else:
            return f"{_called(name, layer)} is no Linear, nor a single ReLU, Tanh or Identity between two"
    if pending != "none":
        return f"{_called(*head[-1])} follows the last Linear"
    if len(set(activations)) > 1:
        return f"its activations differ: {', '.join(activations)}"
    if len(params) > 2 * _MAX_LAYERS:
        return f"it has {len(params) // 2} Linear layers, more than {_MAX_LAYERS}"
    activation = activations[0] if activations else "none"
    return Mlp(nn.Sequential(*(m for _, m in body)), params, activation, *_of_own(module, own))


def _of_own(module: nn.Module, own: bool) -> tuple[nn.Module | None, Any]:
    return (module, tracing.signature(module)) if own else (None, None)


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """What runs one after the other, with the prefix of its parameters' names."""
    if type(module) is nn.Sequential and not _addition(module):
        for name, child in module._modules.items():  # named_children() gives a repeated one once
            yield from _layers(child, f"{prefix}{name}.")
    else:
        yield prefix, module


def _add_linear(
    params: dict[str, nn.Parameter], name: str, layer: nn.Linear, adapted: set[str]
) -> str | None:
    """Adds the layer's W and b; or says what about them the kernels do not know."""
    if layer.bias is None:
        return f"{_called(name, layer)} has no bias"
    for part, param in (("weight", layer.weight), ("bias", layer.bias)):
        if any(param is other for other in params.values()):
            return f"{_called(name, layer)} shares its {part} with a layer before it"
        if f"{name}{part}" not in adapted:
            return f"{name}{part} does not adapt, and stands in or behind a layer that does"
        params[f"{name}{part}"] = param
    return None


def _called(prefix: str, layer: nn.Module) -> str:
    return called(prefix.removesuffix("."), layer)


def _addition(module: nn.Module) -> str | None:
    """What makes a call of the module another than its class's."""
    if "forward" in vars(module):
        return "a forward of its own"
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return "hooks" if hooks else None
