"""Functions of torch (2.13) that are wrong when differentiated twice or under `vmap`, by elementary ones.

- Batch norm in training and layer norm: `vmap(grad)` of them has the wrong gradient with respect to their
  input (pytorch/functorch issue 534), and their third derivatives are wrong everywhere (pytorch/pytorch
  issues 175754, 186256). So is instance norm, built on batch norm.
- Attention: its fused kernels have no second derivative.
- Embedding: under `vmap` the gradient passes the row of `padding_idx` of all tasks but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Elementary(TorchFunctionMode):
    """Within it modules run in functions that are right to any order, in any transform.

    Functions that are given a stray tensor, by its id, raise: a module's parameter where a task's should be.
    """

    def __init__(self, strays: Mapping[int, str]) -> None:
        super().__init__()
        self._strays = strays

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._strays:
            for arg in args:
                if id(arg) in self._strays:
                    raise ValueError(
                        f"module: expected that it uses {self._strays[id(arg)]} by its name alone; its "
                        "forward got the parameter from an object that is no part of the module"
                    )
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
                seen = new.detach().mean(0).flatten().to(running.dtype)
                running.mul_(1 - momentum).add_(seen * momentum)  # vmap has no rule for lerp_
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


def _attention(*args: Any, need_weights: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, which does without kernels to return weights."""
    out, weights = F.multi_head_attention_forward(*args, need_weights=True, **kwargs)
    return out, weights if need_weights else None


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    plain = torch.ops.aten._scaled_dot_product_attention_math.default
    return plain(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.embedding`: the padding row as a constant, which no gradient reaches."""
    if padding_idx is not None:
        rows = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)
        weight = torch.where(rows == padding_idx % weight.shape[0], weight.detach(), weight)
    return F.embedding(input, weight, None, *args, **kwargs)


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    F.scaled_dot_product_attention: _scaled_dot_product,
}
