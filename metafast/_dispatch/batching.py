"""What ops make of a dimension that vmap hides, where they are called with it as they are.

The products of a convolution take it themselves, in `torch.func`, among the tasks or the images of a task.

A backward op that takes lists of tensors makes one call for each of many gradients:
``torch.autograd.grad(is_grads_batched=True)``, and so ``torch.autograd.functional.jacobian(vectorize=True)``,
runs the backward on tensors with a hidden dimension (torch's older vmap, below autograd), for which torch has
a fallback, but not for lists. Calls of these inside `torch.func` do not come here: see doors.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_OPS = (
    "inner_sgd_backward",
    "maml_loss_backward",
    "conv_inner_sgd_backward",
    "conv_forward_backward",
    "lstm_unroll_backward",
)

_PRODUCTS = ("task_conv2d_maps", "task_conv2d_images", "task_conv2d_weight")


def register(namespace: str) -> torch.library.Library:
    """Gives the ops of a namespace their rules, for as long as the result lives."""
    library = torch.library.Library(namespace, "IMPL")
    ops = getattr(torch.ops, namespace)
    for name in _OPS:
        library.impl(name, _one_by_one(getattr(ops, name).default), "Batched")
    for name in _PRODUCTS:
        rule = _folded(getattr(ops, name).default, shares_weight="weight" not in name)
        torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    return library


def _folded(op: Callable[..., Tensor], *, shares_weight: bool) -> Callable[..., tuple[Tensor, int]]:
    """A product's rule: the dimension joins the tasks; or, where a weight as second factor does not have it,
    the images of a task, whose kernels they share."""

    def rule(info: Any, in_dims: Any, first: Tensor, second: Tensor, *sizes: Any) -> tuple[Tensor, int]:
        dim, other = in_dims[:2]
        if shares_weight and other is None:
            images = first.movedim(dim, 1)  # [T, V, B, ...]
            return op(images.flatten(1, 2), second, *sizes).unflatten(1, images.shape[1:3]), 1

        def tasks(tensor: Tensor, dim: int | None) -> Tensor:  # [V, T, ...]
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        first, second = tasks(first, dim), tasks(second, other)
        return op(first.flatten(0, 1), second.flatten(0, 1), *sizes).unflatten(0, first.shape[:2]), 0

    return rule


def _one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def plain(value: Any) -> Any:
            """With the hidden dimension first; of size 1 for a tensor that has none."""
            return torch._remove_batch_dim(value, level, 1, 0) if isinstance(value, Tensor) else value

        args = tree_map(plain, args)
        size = max(len(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))

        def element(value: Any, i: int) -> Any:
            return value[i if len(value) == size else 0] if isinstance(value, Tensor) else value

        results = [op(*tree_map(lambda value, i=i: element(value, i), args)) for i in range(size)]
        return tree_map(lambda *parts: torch._add_batch_dim(torch.stack(parts), 0, level), *results)

    return rule
