"""Functions of torch (2.13) that are wrong when differentiated twice or under `vmap`, or slow, by others.

- Batch, instance and layer norm: see norms.py.
- Attention: its fused kernels have no second derivative.
- Embedding: under `vmap` the gradient passes the row of `padding_idx` of all tasks but the first.
- Convolution in two dimensions, without groups and dilation: under `vmap` a group for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metafast.adaptation import norms
from metafast.ops.convolutional import task_conv2d

Result = TypeVar("Result")


class Exact(TorchFunctionMode):
    """Within it modules run in functions that are right to any order, in any transform.

    Functions that are given a stray tensor, by its id, raise: a module's parameter where a task's should be.

    With ``by_first`` (n, of m), batch norm of m examples goes by the statistics of the first n.
    """

    def __init__(self, strays: Mapping[int, str], by_first: tuple[int, int] | None = None) -> None:
        super().__init__()
        self._strays = strays
        self._by_first = by_first

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
        if self._by_first is not None and func is F.batch_norm:
            first, of = self._by_first
            rows, rest = divmod(len(args[0]), of)  # of an example, where a module normalises its parts
            if rest:
                raise ValueError(
                    "statistics_of: expected a module whose batch norm has as many rows of each example, got "
                    f"{len(args[0])} rows of {of} examples"
                )
            return norms.batch_norm(*args, **(kwargs or {}), by_first=first * rows)
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def restoring_modes(run: Callable[[], Result]) -> Result:
    """What it returns. Where it raises, the thread's modes and transforms are what they were: an interrupt in
    the midst of entering one, or while torch sets one aside for a call, would leave it, or lose another."""
    before = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    transforms, records = torch._C._functorch.get_dynamic_layer_stack_depth(), torch.is_grad_enabled()
    try:
        return run()
    except BaseException:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(transforms)
        torch._C._set_grad_enabled(records)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in before:
            torch._C._push_on_torch_function_stack(mode)
        raise


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


def is_task_conv2d(part: nn.Module) -> bool:
    """Does the layer run as `metafast.task_conv2d`?"""
    return type(part) is nn.Conv2d and part.groups == 1 and part.dilation == (1, 1) and part.padding != "same"


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, with the weights as those of one task: `vmap` makes them of many."""
    padding = 0 if padding == "valid" else padding
    if groups != 1 or padding == "same" or _pair(dilation) != (1, 1) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    of_task = (None if tensor is None else tensor.unsqueeze(0) for tensor in (input, weight, bias))
    return task_conv2d(*of_task, stride=_pair(stride), padding=_pair(padding)).squeeze(0)


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(size, int):
        return size, size
    return tuple(size) * 2 if len(size) == 1 else tuple(size)


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: norms.batch_norm,
    F.instance_norm: norms.instance_norm,
    F.layer_norm: norms.layer_norm,
    F.conv2d: _conv2d,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    F.scaled_dot_product_attention: _scaled_dot_product,
}
