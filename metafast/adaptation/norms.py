"""Batch, instance and layer norm whose derivatives are right to any order.

torch's own (2.13) have wrong third derivatives (pytorch/pytorch issues 175754, 186256), and under `vmap`
wrong second ones with respect to the input (pytorch/functorch issue 534). Here they are made of elementary
operations; but where no transform is active they take torch's kernels for the value and the first derivative,
which are the faster, and elementary operations for what is differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    by_first: int | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; in training by the statistics of x, or of its first rows, which do
    not enter the running ones."""
    channels = [1, -1, *[1] * (x.dim() - 2)]
    if not training:
        return _by_running(x, running_mean, running_var, weight, bias, eps, channels)
    over = [0, *range(2, x.dim())]
    _refuse_one_value(x[:by_first], over)
    if by_first is not None:
        return _elementary(x, over, eps, weight, bias, channels, (None, None, 0.0), by_first)
    if _has_kernel(x, weight, running_mean):
        return _Normed.apply(_Batch(eps, running_mean, running_var, momentum), x, weight, bias)[0]
    return _elementary(x, over, eps, weight, bias, channels, (running_mean, running_var, momentum))


def instance_norm(
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
    channels = [1, -1, *[1] * (x.dim() - 2)]
    if not use_input_stats:
        return _by_running(x, running_mean, running_var, weight, bias, eps, channels)
    over = list(range(2, x.dim()))
    _refuse_one_value(x, over)
    return _elementary(x, over, eps, weight, bias, channels, (running_mean, running_var, momentum))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    if _has_kernel(x, weight, None):
        return _Normed.apply(_Layer(eps, list(normalized_shape)), x, weight, bias)[0]
    over = list(range(-len(normalized_shape), 0))
    return _elementary(x, over, eps, weight, bias, [1, *normalized_shape], (None, None, 0.0))


def _has_kernel(x: Tensor, weight: Tensor | None, running: Tensor | None) -> bool:
    """May torch's kernel give the value and its first derivative?"""
    composes = not (_transforms_active() or torch.compiler.is_compiling())
    return composes and x.numel() > 0 and all(t is None or t.dtype == x.dtype for t in (weight, running))


def _refuse_one_value(x: Tensor, over: Sequence[int]) -> None:
    if all(x.shape[dim] == 1 for dim in over):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def _by_running(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels: Sequence[int],
) -> Tensor:
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * scale.view(channels) + shift.view(channels)


def _elementary(
    x: Tensor,
    over: Sequence[int],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    running: tuple[Tensor | None, Tensor | None, float],
    by_first: int | None = None,
) -> Tensor:
    """x by the mean and variance over some dimensions, perhaps of its first rows; weight and bias as of this
    shape."""
    mean = x[:by_first].mean(over, keepdim=True)
    centred = x - mean
    var = centred[:by_first].square().mean(over, keepdim=True)
    running_mean, running_var, momentum = running
    if running_mean is not None:
        count = x.numel() // max(mean.numel(), 1)
        for kept, new in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
            seen = new.detach().mean(0).flatten().to(kept.dtype)
            kept.mul_(1 - momentum).add_(seen * momentum)  # vmap has no rule for lerp_
    out = centred * (var + eps).rsqrt()
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


# --- by torch's kernels ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Batch:
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        running = self.running_mean, self.running_var
        return torch.native_batch_norm(x, weight, bias, *running, True, self.momentum, self.eps)

    def gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, ...]:
        wanted, backward = [True] * 3, torch.ops.aten.native_batch_norm_backward.default
        return backward(grad, x, weight, None, None, mean, rstd, True, self.eps, wanted)

    def dims(self, x: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Those over which x is normed, those over which weights are shared, and the shape of weights."""
        over = [0, *range(2, x.dim())]
        return over, over, [1, -1, *[1] * (x.dim() - 2)]


@dataclass(frozen=True, eq=False)
class _Layer:
    eps: float
    shape: list[int]

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)

    def gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, ...]:
        scale = torch.ones(self.shape, dtype=x.dtype, device=x.device) if weight is None else weight
        wanted, backward = [True] * 3, torch.ops.aten.native_layer_norm_backward.default
        return backward(grad, x, self.shape, mean, rstd, scale, scale, wanted)

    def dims(self, x: Tensor) -> tuple[list[int], list[int], list[int]]:
        first = x.dim() - len(self.shape)
        return list(range(first, x.dim())), list(range(first)), [1] * first + self.shape


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, norm: _Batch | _Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = norm.value(x, weight, bias)
        ctx.norm, ctx.has_bias = norm, bias is not None
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = _Gradient.apply(ctx.norm, grad, *ctx.saved_tensors)
        has_weight = ctx.saved_tensors[1] is not None
        return None, grad_x, grad_weight if has_weight else None, grad_bias if ctx.has_bias else None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, norm: _Batch | _Layer, grad: Tensor, x: Tensor, weight: Tensor | None, *moments: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.norm = norm
        ctx.save_for_backward(grad, x, weight, *moments)
        grads = norm.gradient(grad, x, weight, *moments)
        return tuple(x.new_zeros(()) if g is None else g for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By autograd: of torch's kernel, or of elementary operations if it is to be differentiated again."""
        *tensors, mean, rstd = ctx.saved_tensors
        again = torch.is_grad_enabled()
        wanted = [t is not None and need for t, need in zip(tensors, ctx.needs_input_grad[1:4], strict=True)]
        with torch.enable_grad():
            if not again:
                leaves = (t if t is None else t.detach() for t in tensors)
                tensors = [t.requires_grad_() if want else t for t, want in zip(leaves, wanted, strict=True)]
            if again or tensors[2] is None:  # torch's has no derivative without weights
                results = _gradient(ctx.norm, *tensors)
            else:
                results = ctx.norm.gradient(*tensors, mean, rstd)
            inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
            outputs = [(out, g) for out, g in zip(results, grads, strict=True) if out is not None]
            of, along = zip(*outputs, strict=True)
            found = iter(torch.autograd.grad(of, inputs, along, create_graph=again))
        return None, *(next(found) if want else None for want in wanted), None, None


def _gradient(
    norm: _Batch | _Layer, grad: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, the last two if there is a weight."""
    over, shared, shape = norm.dims(x)
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(over, keepdim=True) + norm.eps).rsqrt()
    normed = centred * rstd
    scaled = grad if weight is None else grad * weight.view(shape)
    along = (scaled * normed).mean(over, keepdim=True)
    grad_x = rstd * (scaled - scaled.mean(over, keepdim=True) - normed * along)
    if weight is None:
        return grad_x, None, None
    return grad_x, (grad * normed).sum(shared).view(weight.shape), grad.sum(shared).view(weight.shape)
