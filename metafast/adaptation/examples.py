"""What people give a module and a loss: tensors, and tuples, lists and dicts of them, each [T, S, ...]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Examples = Any  # a tensor, or a tuple, a list or a dict of Examples


def arguments_of(x: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called with x: a tuple is its arguments, a dict its keywords, another its only one."""
    if isinstance(x, dict):
        return (), x
    return (tuple(x) if type(x) is tuple else (x,)), {}


def at(examples: Examples, *index: int) -> Examples:
    """Those of one task, or of one step (and task)."""
    if isinstance(examples, Tensor):  # for torch's way through a tree is as long as a small step's kernels
        return examples[index]
    if type(examples) is tuple:
        return tuple(at(part, *index) for part in examples)
    return tree_map(lambda leaf: leaf[index], examples)


def blank_step(examples: Examples) -> Examples:
    """Of the shape of those of one step, of no matter what."""
    return tree_map(lambda leaf: None if leaf is None else leaf.new_zeros(leaf.shape[1:]), examples)


def leaves_of(examples: Examples) -> list[Any]:
    return tree_leaves(examples)


def stacked(results: list[Examples]) -> Examples:
    """What the tasks gave, one after the other, as one: each leaf [T, ...]."""
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def shapes_of(examples: Examples) -> str:
    """For a message."""
    if isinstance(examples, Tensor):
        return f"{list(examples.shape)} of {examples.dtype}"
    return str(tree_map(lambda leaf: list(leaf.shape), examples))


def check_examples(name: str, examples: Examples, lead: str = "T, S", **sizes: int | None) -> int:
    """Refuses what is no tensor, nor a tree of tensors, with these leading dimensions; returns T.

    `sizes` are those that are known. The tensors of a tree agree in T alone: a graph has as many edges as it
    likes.
    """
    axes = lead.split(", ")
    leaves = [examples] if isinstance(examples, Tensor) else leaves_of(examples)
    if not leaves:
        raise ValueError(f"{name}: expected a tensor or a tree of tensors, got {examples!r}")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            where = "" if leaf is examples else " in it"
            kind = type(leaf).__name__
            raise TypeError(
                f"{name}: expected a tensor, or a tuple, list or dict of tensors, got {kind}{where}"
            )
        shape = leaf.shape
        if len(shape) < len(axes) or any(
            size is not None and shape[axes.index(axis)] != size for axis, size in sizes.items()
        ):
            known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if size is not None)
            of = f" with {known}" if known else ""
            raise ValueError(f"{name}: expected shape [{lead}, ...]{of}, got {list(shape)}")
        if sizes.get("T") is None:
            sizes["T"] = shape[axes.index("T")]
    return sizes["T"]


def without(examples: Examples, counts: Tensor, filling: int = 0) -> Examples:
    """With nothing in the place of the examples that do not count, so that no NaN of theirs spreads."""

    def cleared(leaf: Tensor) -> Tensor:
        each = counts.view(*counts.shape, *[1] * (leaf.dim() - counts.dim()))
        return torch.where(each, leaf, torch.full_like(leaf, filling))

    return tree_map(cleared, examples)
