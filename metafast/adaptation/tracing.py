"""A module whose forward runs layers one after the other, as the `nn.Sequential` that it could be.

A call of the module's double is recorded: which functions of torch it runs, on what. (`torch.fx` would put
its own functions into `nn.Module` for the time of a trace, and so into the calls of other threads.) What else
a forward may depend on shows in its code: only those are taken that refer to nothing but torch and the module
itself, and that leave the module as it was. What was found holds as long as the module's parts and options
are the same.
"""

from __future__ import annotations

import builtins
import dis
import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.overrides import TorchFunctionMode

from metafast.adaptation.functions import restoring_modes
from metafast.adaptation.recorded import Call, Layers, chain_of
from metafast.adaptation.scratch import Scratch, called

_PARTS = (nn.Linear, nn.ReLU, nn.Tanh, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList)
_PARTS += (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# By these names a forward gets at the sizes of a tensor, or depends on them.
_SIZES = {"size", "shape", "dim", "ndim", "numel", "view", "reshape", "len"}
_BUILTINS = {"super", "len", "range", "zip", "enumerate", "reversed"}

_found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Layers | str]] = weakref.WeakKeyDictionary()


def layers_of(module: nn.Module, x: Tensor | None) -> tuple[Layers, Any] | str:
    """The layers that the module runs, and its signature; or why it is not known to be a chain of them.

    Args:
        x: [T, S, ...], of which the first task's is what the recorded call has.
    """
    if x is None:
        return "what its forward does shows in a call: explain(module, x)"
    if torch.compiler.is_compiling() or _transforms_active() or 0 in x.shape[:2]:
        return "its forward cannot be tried here"
    key = signature(module)
    known, layers = _found.get(module, (None, ""))
    if known != key:
        layers = _recorded(module, x[0].detach())
        _found[module] = key, layers
    return layers if isinstance(layers, str) else (layers, key)


def signature(module: nn.Module) -> Any:
    """What a recorded call holds for: parts, parameters, and all attributes that may be options."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            name,
            type(part).forward,
            *(
                (key, value if isinstance(value, plain) else id(value))
                for key, value in vars(part).items()
                if not key.startswith("_")
            ),
            *map(id, part._parameters.values()),
            *map(id, part._modules.values()),
        )
        for name, part in module.named_modules()
    )


def _recorded(module: nn.Module, x: Tensor) -> Layers | str:
    layers = _try(module, x)
    kinds = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    asking = [codes for codes in map(_codes, kinds) if any(_SIZES & _names(code) for code in codes)]
    if isinstance(layers, str) or not asking:
        return layers
    if any(_branches(code) for codes in asking for code in codes):
        return "its code asks for sizes, and may branch by them"
    others = _try(module, torch.cat([x, x[:1]]))  # what depends on the number of examples shows
    if isinstance(others, str) or [*map(str, others)] != [*map(str, layers)]:
        return "its layers depend on how many examples there are"
    return layers


def _try(module: nn.Module, x: Tensor) -> Layers | str:
    """The layers that a call runs, or why it is no chain of them."""
    double = Scratch(module).module
    for name, part in double.named_modules():
        if type(part) in _PARTS:
            continue
        if type(part).__module__.startswith("torch."):
            return f"{called(name, part)} is part of it"
        if (foreign := _foreign(type(part), "forward", set())) is not None:
            return f"its code refers to {foreign}, which may change"
    for part in double.modules():  # batch norm writes into them
        part._buffers.update({name: b.clone() for name, b in part._buffers.items() if b is not None})
    before = signature(double)
    record = _Record()

    def call() -> Any:
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad(), record:
            return double(x)

    try:
        out = restoring_modes(call)
    except Exception:
        return "its forward raises"  # and will again, with a message
    if signature(double) != before:
        return "its forward changes it"
    return chain_of(module, double, x, record.calls, out)


class _Record(TorchFunctionMode):
    """All functions of torch that run within it, but for those that only they call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, args, kwargs or {}, result))
        return result


def _foreign(kind: type, name: str, seen: set[str]) -> str | None:
    """What a method, or one that it calls, refers to besides torch and the module itself."""
    if name in seen:
        return None
    seen.add(name)
    function = next((vars(c)[name] for c in kind.__mro__ if name in vars(c)), None)
    if not isinstance(function, types.FunctionType):
        return None if function is None or hasattr(nn.Module, name) else name
    if set(function.__code__.co_freevars) - {"__class__"}:
        return "variables around it"
    own = _globals(function.__code__)
    for used in _names(function.__code__):
        if used in own and used in function.__globals__:
            value = function.__globals__[used]
            owner = (
                value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
            )
            if value is not math and not str(owner).startswith("torch"):
                return used
        elif used in own and used in vars(builtins) and used not in _BUILTINS:
            return used
        if not hasattr(nn.Module, used) and (foreign := _foreign(kind, used, seen)) is not None:
            return foreign
    return None


def _names(code: types.CodeType) -> set[str]:
    """All names that the code and what is nested in it refer to."""
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)


def _globals(code: types.CodeType) -> set[str]:
    """Of these those that are no attributes."""
    nested = [_globals(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    loads = (step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_GLOBAL"))
    return set(loads).union(*nested)


def _codes(kind: type, name: str = "forward") -> list[types.CodeType]:
    """Those of a method and of what it calls, and of what is nested in them."""
    found: dict[str, list[types.CodeType]] = {}

    def add(name: str) -> None:
        function = next((vars(c)[name] for c in kind.__mro__ if name in vars(c)), None)
        if name in found or not isinstance(function, types.FunctionType):
            return
        found[name] = [function.__code__]
        found[name] += [c for c in function.__code__.co_consts if isinstance(c, types.CodeType)]
        for used in _names(function.__code__):
            if not hasattr(nn.Module, used):
                add(used)

    add(name)
    return [code for codes in found.values() for code in codes]


def _branches(code: types.CodeType) -> bool:
    """Does it go by a comparison or a condition?"""
    conditional = ("POP_JUMP", "JUMP_IF", "COMPARE", "CONTAINS")
    return any(step.opname.startswith(conditional) for step in dis.get_instructions(code))
