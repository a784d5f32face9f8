"""The layers that recorded calls of torch's functions stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = list[
    tuple[str, nn.Module]
]  # what runs one after the other, with the prefix of its parameters' names


class Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


_ACTIVATIONS: dict[Callable[..., Any], type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_), nn.ReLU),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_), nn.Tanh),
}
_FLATTENS = (torch.flatten, Tensor.flatten)
_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
_MEANS = (torch.mean, Tensor.mean)
# What is asked of a tensor, which tracing.py watches, and what is done to a counter of batch norm.
_SIZES = (Tensor.size, Tensor.dim, Tensor.shape.__get__, Tensor.ndim.__get__)
_COUNTS = (Tensor.add_, Tensor.__float__)

# The names of their arguments behind the first, with the defaults.
_CONV = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False}
_NORM |= {"momentum": 0.1, "eps": 1e-5}
_MAX = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_MAX |= {"return_indices": False}
_AVERAGE = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False}
_AVERAGE |= {"count_include_pad": True, "divisor_override": None}
_LINEAR = {"weight": None, "bias": None}
_MEAN = {"dim": None, "keepdim": False}


def chain_of(module: nn.Module, double: nn.Module, x: Tensor, calls: list[Call], out: Any) -> Layers | str:
    """The layers, if the calls are a chain of them from x to out; or why they are not."""
    reader = _Reader(module, double)
    layers: Layers = []
    for call in calls:
        if call.function in _SIZES or reader.counts(call):
            continue
        if not call.args or call.args[0] is not x:
            return "its layers do not run one after the other"
        found = reader.read(call)
        if isinstance(found, str):
            return found
        layers += found
        x = call.result
    return layers if out is x else "it returns something else than its last layer's output"


class _Reader:
    def __init__(self, module: nn.Module, double: nn.Module) -> None:
        self._module = module
        self._parts: dict[int, tuple[str, Any]] = {}  # by the id of a tensor that it alone has
        for name, part in double.named_modules():
            if type(part) in (nn.Linear, nn.Conv2d, nn.BatchNorm2d):
                for tensor in (part.weight, getattr(part, "running_mean", None)):
                    if tensor is not None:
                        self._parts[id(tensor)] = name, part
        self._counters = {
            id(part.num_batches_tracked): part
            for _, part in self._parts.values()
            if type(part) is nn.BatchNorm2d and part.num_batches_tracked is not None
        }
        self._counted: set[int] = set()

    def counts(self, call: Call) -> bool:
        """Is it batch norm's own count of its batches?"""
        norm = self._counters.get(id(call.args[0])) if call.args else None
        if norm is None or call.function not in _COUNTS:
            return False
        self._counted.add(id(norm))
        return True

    def read(self, call: Call) -> Layers | str:
        """The layers that a call stands for, or what is unknown about it."""
        function, (x, *args), kwargs, result = call
        options = {key: value for key, value in kwargs.items() if key != "inplace"}
        if function is F.linear:
            return self._part(nn.Linear, _bound(_LINEAR, args, kwargs))
        if function is torch.conv2d:
            return self._convolution(_bound(_CONV, args, kwargs))
        if function is F.batch_norm:
            return self._norm(x, _bound(_NORM, args, kwargs))
        if function in _ACTIVATIONS and not options and all(value in (True, False) for value in args):
            return [("", _ACTIVATIONS[function]())]
        if function in _FLATTENS and (tuple(args) in ((1,), (1, -1)) or options == {"start_dim": 1}):
            return [("", nn.Flatten())]
        if function in _VIEWS and result.shape == (*x.shape[:1], x.shape[1:].numel()):
            return [("", nn.Flatten())]
        if function in (F.max_pool2d, torch.max_pool2d):
            return [("", nn.MaxPool2d(**_bound(_MAX, args, kwargs)))]
        if function is F.avg_pool2d:
            return [("", nn.AvgPool2d(**_bound(_AVERAGE, args, kwargs)))]
        if function is F.adaptive_avg_pool2d:
            return [("", nn.AdaptiveAvgPool2d(*args, **kwargs))]
        if function in _MEANS and x.dim() == 4:
            of = _bound(_MEAN, args, kwargs)
            if isinstance(of["dim"], (tuple, list)) and sorted(dim % 4 for dim in of["dim"]) == [2, 3]:
                return [("", nn.AdaptiveAvgPool2d(1)), *([] if of["keepdim"] else [("", nn.Flatten())])]
        return f"it runs {getattr(function, '__name__', function)}, which the kernels do not know"

    def _part(self, kind: type[nn.Module], of: dict[str, Any]) -> Layers | str:
        """The part of the module that has the weight; its own bias goes with it."""
        name, part = self._parts.get(id(of["weight"]), ("", None))
        if type(part) is not kind:
            return f"it runs a {kind.__name__}'s function with a weight that is no layer's"
        if of["bias"] is not part.bias:
            return f"{name} does not run with its own bias"
        return [(f"{name}.", self._module.get_submodule(name))]

    def _convolution(self, of: dict[str, Any]) -> Layers | str:
        found = self._part(nn.Conv2d, of)
        if isinstance(found, str):
            return found
        (name, part) = found[0]
        for option in ("stride", "padding", "dilation"):
            given, own = of[option], getattr(part, option)
            if given != own and (isinstance(given, str) or isinstance(own, str) or _pair(given) != own):
                return f"{name}forward has another {option}"
        return found if of["groups"] == part.groups else f"{name}forward has other groups"

    def _norm(self, x: Tensor, of: dict[str, Any]) -> Layers | str:
        tensors = [t for t in (of["weight"], of["running_mean"]) if t is not None]
        if not tensors and x.dim() == 4 and of["training"] and of["bias"] is None:
            norm = nn.BatchNorm2d(x.shape[1], of["eps"], affine=False, track_running_stats=False)
            return [("", norm)]
        name, part = next((self._parts[id(t)] for t in tensors if id(t) in self._parts), ("", None))
        if type(part) is not nn.BatchNorm2d:
            return "it runs batch_norm on tensors that are no BatchNorm2d's"
        follows = part.training and part.track_running_stats
        kept = part.running_mean if follows or not part.training else None
        same = all(
            given is own
            for given, own in (
                (of["weight"], part.weight),
                (of["bias"], part.bias),
                (of["running_mean"], kept),
            )
        )
        by_batch = part.training or part.running_mean is None
        if not same or of["training"] != by_batch or of["eps"] != part.eps:
            return f"{name} does not run as its own forward does"
        counted = id(part) in self._counted and part.momentum in (None, of["momentum"])
        if follows and part.running_mean is not None and not counted:
            return f"{name} does not follow the batches as its own forward does"
        return [(f"{name}.", self._module.get_submodule(name))]


def _bound(names: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names."""
    return names | dict(zip(names, args, strict=False)) | kwargs


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
