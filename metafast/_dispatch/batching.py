"""What a backward op that takes lists of tensors does for many gradients at once: one call for each of them.

``torch.autograd.grad(is_grads_batched=True)``, and so ``torch.autograd.functional.jacobian(vectorize=True)``,
runs the backward on tensors with a hidden dimension (torch's older vmap, below autograd), for which torch has
a fallback, but not for lists. Calls inside `torch.func` do not come here: see doors.py.
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


def register(namespace: str) -> torch.library.Library:
    """Gives the ops of a namespace their rules, for as long as the result lives."""
    library = torch.library.Library(namespace, "IMPL")
    for name in _OPS:
        library.impl(name, _one_by_one(getattr(getattr(torch.ops, namespace), name).default), "Batched")
    return library


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
