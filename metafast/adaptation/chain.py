"""What the fused paths have in common: a chain of layers, behind a body that does not adapt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metafast.adaptation import tracing
from metafast.adaptation.scratch import called


@dataclass(frozen=True, eq=False, kw_only=True)
class Known(ABC):
    """A module that is a body, which does not adapt, followed by a network of a kind that the kernels know,
    all of which does."""

    body: nn.Sequential  # perhaps empty
    params: dict[str, nn.Parameter]  # in the order of the kernels, by their names in the module
    own: nn.Module | None  # the caller's, where it was recognised by what its forward runs
    signature: Any  # of that, then

    op: ClassVar[str]
    example: ClassVar[str]  # the shape of what the network takes of an example

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """The numbers of the kernels' layers that the parameters are in."""

    def still(self) -> bool:
        """Does the module run the same layers as when it was recognised?"""
        return self.own is None or tracing.signature(self.own) == self.signature

    def features(self, x: Tensor, *, per_step: bool = False) -> Tensor:
        """What the body makes of the input: [T, S, ...] -> [T, S, ...], or [K, T, S, ...] alike."""
        if not len(self.body):
            return x
        of_tasks = torch.vmap(self.body)
        return of_tasks(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if per_step else of_tasks(x)

    def behind(self) -> str:
        """What stands before the network, for its description."""
        own = f", as {type(self.own).__name__}.forward runs" if self.own is not None else ""
        body = ", ".join(type(layer).__name__ for layer in self.body)
        return own + (f", behind what does not adapt ({body})" if body else "")


def layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """What runs one after the other, with the prefix of its parameters' names."""
    if type(module) is nn.Sequential and not addition(module):
        for name, child in module._modules.items():  # named_children() gives a repeated one once
            yield from layers(child, f"{prefix}{name}.")
    else:
        yield prefix, module


def add_params(
    params: dict[str, nn.Parameter], name: str, layer: nn.Module, parts: Iterable[str], adapted: set[str]
) -> str | None:
    """Adds these parameters of a layer; or says what about them the kernels do not know."""
    for part in parts:
        param = getattr(layer, part)
        if any(param is other for other in params.values()):
            return f"{layer_name(name, layer)} shares its {part} with a layer before it"
        if f"{name}{part}" not in adapted:
            return f"{name}{part} does not adapt, and stands in or behind a layer that does"
        params[f"{name}{part}"] = param
    return None


def layer_name(prefix: str, layer: nn.Module) -> str:
    return called(prefix.removesuffix("."), layer)


def addition(module: nn.Module) -> str | None:
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
