"""A module whose forward runs layers one after the other, as the `nn.Sequential` that it could be.

A call of the module's double is recorded: which functions of torch it runs, on what. (`torch.fx` would put
its own functions into `nn.Module` for the time of a trace, and so into the calls of other threads.) What else
a forward may depend on shows in its code: only those are taken that refer to nothing but torch and the module
itself, and that leave the module as it was. What was found holds as long as the module's parts and options
are the same.
"""

from __future__ import annotations

import builtins
import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.overrides import TorchFunctionMode

from metafast.adaptation.functions import restoring_modes
from metafast.adaptation.scratch import Scratch, called

Layers = list[
    tuple[str, nn.Module]
]  # what runs one after the other, with the prefix of its parameters' names

_ACTIVATIONS: dict[Callable[..., Any], Callable[[], nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    Tensor.relu: nn.ReLU,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    Tensor.tanh: nn.Tanh,
}
_PARTS = (nn.Linear, nn.ReLU, nn.Tanh, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList)
_FLATTENS = (torch.flatten, Tensor.flatten)
_BUILTINS = {"super", "len", "range", "zip", "enumerate", "reversed"}

_found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Layers | str]] = weakref.WeakKeyDictionary()


def layers_of(module: nn.Module, x: Tensor | None) -> Layers | str:
    """The layers that the module runs; or why it is not known to be a chain of them.

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
    return layers


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
    double = Scratch(module).module
    for name, part in double.named_modules():
        if type(part) in _PARTS:
            continue
        if type(part).__module__.startswith("torch."):
            return f"{called(name, part)} is part of it"
        if (foreign := _foreign(type(part), "forward", set())) is not None:
            return f"its code refers to {foreign}, which may change"
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
    return _chain(module, double, x, record.calls, out)


def _chain(
    module: nn.Module, double: nn.Module, x: Tensor, calls: list[tuple[Any, ...]], out: Any
) -> Layers | str:
    """The layers, if the calls (function, args, kwargs, result) are a chain of them from x to out."""
    linear = {
        id(part.weight): (name, part) for name, part in double.named_modules() if type(part) is nn.Linear
    }
    layers: Layers = []
    for function, args, kwargs, result in calls:
        if not args or args[0] is not x:
            return "its layers do not run one after the other"
        options = {key: value for key, value in kwargs.items() if key != "inplace"}
        if function is F.linear and len(args) == 3 and id(args[1]) in linear:
            name, part = linear[id(args[1])]
            if args[2] is not part.bias:
                return f"{name} does not run with its own bias"
            layers.append((f"{name}.", module.get_submodule(name)))
        elif function in _ACTIVATIONS and not options and all(value in (True, False) for value in args[1:]):
            layers.append(("", _ACTIVATIONS[function]()))
        elif function in _FLATTENS and (args[1:] in ((1,), (1, -1)) or options == {"start_dim": 1}):
            layers.append(("", nn.Flatten()))
        else:
            return f"it runs {getattr(function, '__name__', function)}, which the kernels do not know"
        x = result
    return layers if out is x else "it returns something else than its last layer's output"


class _Record(TorchFunctionMode):
    """All functions of torch that run within it, but for those that only they call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
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
    for used in _names(function.__code__):
        if used in function.__globals__:
            value = function.__globals__[used]
            owner = (
                value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
            )
            if value is not math and not str(owner).startswith("torch"):
                return used
        elif used in vars(builtins) and used not in _BUILTINS:
            return used
        if not hasattr(nn.Module, used) and (foreign := _foreign(kind, used, seen)) is not None:
            return foreign
    return None


def _names(code: types.CodeType) -> set[str]:
    """All names that the code and what is nested in it refer to."""
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)
