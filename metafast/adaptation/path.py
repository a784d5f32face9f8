"""Which path `adapt` takes: the kernels, `torch.func`, or a loop over the tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_choice
from metafast.adaptation import loop, transforms
from metafast.adaptation.chain import layer_name
from metafast.adaptation.examples import Examples, leaves_of
from metafast.adaptation.functions import is_task_conv2d
from metafast.adaptation.inner_loop import InnerLoop
from metafast.adaptation.structure import ConvNet, Mlp, recognise

PATHS = ("fused", "torch.func", "loop")
GENERAL: dict[str, ModuleType] = {"torch.func": transforms, "loop": loop}

_has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
_DEVICES = {
    kind.op: [key.lower() for key in ("CPU", "CUDA") if _has_kernel(f"metafast::{kind.op}", key)]
    for kind in (Mlp, ConvNet)
}

# From which on a CPU is faster task by task: parameters that adapt, and numbers in maps of a task's images.
_MANY, _LARGE_MAPS = 200_000, 32_768


@dataclass(frozen=True, eq=False)
class Plan:
    """The path, and what it needs to know of the module."""

    path: str
    reason: str  # of another than the fused one
    params: dict[str, nn.Parameter]  # those that adapt
    known: Mlp | ConvNet | None = None  # the module as the kernels know it
    features: Tensor | None = None  # what the body of that makes of x


def plan(
    module: nn.Module,
    inner: InnerLoop,
    names: str | Iterable[str] | None,
    path: str | None,
    x: Examples | None,
) -> Plan:
    if path is not None:
        check_choice(PATHS, path=path)
    params = adapted(module, names)
    found: Mlp | ConvNet | str = f"path={path!r} was asked for"
    if path in (None, "fused"):
        found = _known(module, params, inner, x)
    if not isinstance(found, str):
        lead = "K, T, S" if inner.per_step else "T, S"
        features, shape = None, f"[{lead}, {found.example}]"
        if x is not None:
            features = found.features(x, per_step=inner.per_step)
        name, weight = next(iter(found.params.items()))
        known_dims = weight.dim() + 1 + inner.per_step
        if features is None or features.dim() == known_dims:
            return Plan("fused", "", params, found, features)
        if features.dim() < known_dims:
            raise ValueError(
                f"x: expected shape [{lead}, ...], so that {name} {list(weight.shape)} gets {shape}, got "
                f"{list(x.shape)}; one task is a batch of one"
            )
        layer = "Linear" if isinstance(found, Mlp) else "Conv2d"
        found = f"a {layer} has {list(features.shape)} before it, and the kernels know {shape}"
    if path == "fused":
        raise ValueError(
            f"path: expected a module and options that the kernels know for 'fused', but {found}"
        )
    if path is not None:
        return Plan(path, found, params)
    path, why = _general(module, params, x, inner.per_step)
    return Plan(path, f"{found}; {why}", params)


def adapted(module: nn.Module, names: str | Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that adapt, by their names."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if names is not None:
        asked = [names] if isinstance(names, str) else list(names)
        for one in asked:
            if not any(_names(one, name) for name in trained):
                raise ValueError(
                    f"params: expected names of parameters that require grad, or prefixes, got {one!r}; "
                    f"there are {', '.join(trained) or 'none'}"
                )
        trained = {name: p for name, p in trained.items() if any(_names(one, name) for one in asked)}
    if not trained:
        raise ValueError("module: expected a parameter that requires grad and adapts, got none")
    for name, param in trained.items():
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(
                f"module: expected parameters with a shape, got {name} of a lazy layer; call it once"
            )
        if param.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"module: expected parameters of dtype float32 or float64, got {param.dtype} in {name}; "
                "SGD's small steps are lost in fewer bits, torch.autocast runs the rest in 16"
            )
    return trained


def _names(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _known(
    module: nn.Module, params: dict[str, nn.Parameter], inner: InnerLoop, x: Examples | None
) -> Mlp | ConvNet | str:
    """The module as the kernels know it, or what they do not know in it or in the options."""
    if (unknown := inner.beyond_kernels()) is not None:
        return unknown
    if x is not None and not isinstance(x, Tensor):
        return f"x is a {type(x).__name__} of tensors"
    found = recognise(module, set(params), x[0] if x is not None and inner.per_step else x)
    if isinstance(found, str):
        return found
    if isinstance(found, ConvNet) and (running := found.by_running()):
        norm = layer_name(*next(iter(running.values())))
        return f"{norm} goes by its running statistics, not by those of the batch"
    if isinstance(found, ConvNet) and found.affine and inner.layered and inner.momentum:
        return "the kernels have no rates of batch norm's own for each step together with momentum"
    device = next(iter(found.params.values())).device.type
    if device not in _DEVICES[found.op]:
        return f"the kernels do not run on {device}"
    return found


def _general(
    module: nn.Module, params: dict[str, nn.Parameter], x: Examples | None, per_step: bool
) -> tuple[str, str]:
    """The faster of the other two, as bench/networks.py measures them, and why."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "torch.func", "transforms and torch.compile take no torch.autograd.grad in a loop"
    if next(iter(params.values())).device.type != "cpu":
        return "torch.func", "a GPU is the faster the more tasks it has at once"
    if x is not None and leaves_of(x)[0].shape[int(per_step)] == 1:
        return "loop", "one task needs no batch"
    if convolutions := [part for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd)]:
        size = _map_size(convolutions, None if x is None else leaves_of(x)[0].shape[int(per_step) + 1 :])
        if size is None:
            return "loop", "a CPU convolves with one task's kernels faster than with a group for each task"
        if size >= _LARGE_MAPS:
            return (
                "loop",
                f"a CPU keeps one task's maps, of up to {size} numbers, in its cache, not all tasks'",
            )
    if (numbers := sum(p.numel() for p in params.values())) >= _MANY:
        return "loop", f"a CPU keeps one task's {numbers} parameters in its cache, not all tasks'"
    return "torch.func", "many small operations are one for all tasks"


def _map_size(convolutions: list[nn.modules.conv._ConvNd], shape: torch.Size | None) -> int | None:
    """The most numbers that maps of a task's images [S, C, H, W] have; None with a convolution that is not
    `task_conv2d`'s."""
    if shape is None or len(shape) != 4 or not all(map(is_task_conv2d, convolutions)):
        return None
    return shape[0] * shape[2] * shape[3] * max(part.out_channels for part in convolutions)
