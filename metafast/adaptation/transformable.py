"""Runs modules under `torch.func` where torch (2.13) itself gives an error or a wrong second derivative.

- Batch norm in training and layer norm: `vmap(grad)` of them has the wrong gradient with respect to their
  input (pytorch/functorch issue 534), and their third derivatives are wrong everywhere (pytorch/pytorch
  issues 175754, 186256). Here they run in elementary operations; so does instance norm, built on batch norm.
- Attention: its fused kernels have no second derivative. Here it takes the plain one.
- Recurrent networks: `vmap` alone has no rule for them, but for what autograd makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def call(module: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The module with these parameters and buffers, which it may write into."""
    with sdpa_kernel(SDPBackend.MATH), _Elementary():
        return torch.func.functional_call(module, _by_every_name(module, tensors), (x,), tie_weights=False)


def _by_every_name(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the other names of tensors that several parts of the module share.

    `functional_call` ties them itself, but counts a part that runs twice as two, and leaves the second
    one's tensor in the module.
    """
    names: dict[int, list[str]] = {}
    for prefix, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    tied = dict(tensors)
    for group in names.values():
        given = [name for name in group if name in tensors]
        tied |= dict.fromkeys(group, tensors[given[0]]) if given else {}
    return tied


def vmap_without_gradient(module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.vmap`` of a function that calls the module and is not below `torch.func.grad`."""
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        recorded = function

        def function(*args: Any) -> Tensor:
            return torch.func.vjp(lambda *args: recorded(*args), *args)[0]

    return torch.vmap(function, randomness="different")


class _Elementary(TorchFunctionMode):
    """Replaces norms by elementary operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`."""
    over = [0, *range(2, x.dim())]
    return _norm(x, over, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`."""
    over = list(range(2, x.dim()))
    return _norm(x, over, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _norm(
    x: Tensor,
    over: Sequence[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """x [B, C, ...] by its own mean and variance over some dimensions, or by the running ones [C]."""
    channels = [1, -1, *[1] * (x.dim() - 2)]
    if not own:
        mean, var = running_mean.view(channels), running_var.view(channels)
        centred = x - mean
    else:
        mean = x.mean(over, keepdim=True)
        centred = x - mean
        var = centred.square().mean(over, keepdim=True)
        count = x.numel() // max(mean.numel(), 1)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        if running_mean is not None:
            unbiased = var * (count / max(count - 1, 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.lerp_(new.detach().mean(0).flatten().to(running.dtype), momentum)
    out = centred * (var + eps).rsqrt()
    out = out if weight is None else out * weight.view(channels)
    return out if bias is None else out + bias.view(channels)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    over = list(range(-len(normalized_shape), 0))
    centred = x - x.mean(over, keepdim=True)
    out = centred * (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
}
