"""The values of labels, which every operation with labels checks, with the errors of the compiled ones.

On the CPU a value that does not fit raises ValueError. On CUDA, which nothing waits for, and in a compiled
graph, which cannot ask, it is an assertion where the graph or the kernel runs. Labels are never
differentiated, so what a transform of `torch.func` has wrapped them in hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

IGNORED = -100  # torch's ignore_index: a label that takes no part


def checked_labels(name: str, labels: Tensor, classes: int | Tensor) -> Tensor:
    """Labels [..., S] that are each in [0, classes), where classes is a number or [...], or ignored."""
    return _checked(name, labels, classes, labels == IGNORED, f" or {IGNORED} (ignored)")


def checked_classes(name: str, labels: Tensor, classes: int) -> Tensor:
    """Labels [..., S] that are each in [0, classes)."""
    return _checked(name, labels, classes, False, "")


def _checked(name: str, labels: Tensor, classes: int | Tensor, also: Tensor | bool, said: str) -> Tensor:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected a tensor of dtype int64, got {labels.dtype}")
    limit = classes.unsqueeze(-1) if isinstance(classes, Tensor) else classes
    good = ((labels >= 0) & (labels < limit)) | also

    def message(found: int, limit: int, task: int, position: int) -> str:
        expected = f"{name}: expected classes in [0, {limit}){said}"
        return f"{expected}, got {found} at position {position} of task {task}"

    return _require(labels, good, f"{name}: expected classes{said}", (labels, limit), message)


def checked_support_labels(name: str, labels: Tensor, classes: int | Tensor, member: Tensor) -> Tensor:
    """Labels as `checked_labels` has them, and every class among them; member is [..., N, S], N the most."""
    labels = checked_labels(name, labels, classes)
    limit = classes.unsqueeze(-1) if isinstance(classes, Tensor) else classes
    absent = torch.arange(member.shape[-2], device=labels.device) >= limit
    expected = f"{name}: expected a support example of every class"

    def message(task: int, missing: int) -> str:
        return f"{expected}, got none of class {missing} in task {task}"

    return _require(labels, member.any(-1) | absent, expected, (), message)


def checked_ways(ways: Tensor, num_classes: int) -> Tensor:
    """How many classes each task has, [...]: from 1 to num_classes."""
    if ways.dtype != torch.int64:
        raise TypeError(f"ways: expected a tensor of dtype int64, got {ways.dtype}")
    expected = f"ways: expected values in [1, num_classes = {num_classes}]"

    def message(found: int, task: int, _: int) -> str:
        return f"{expected}, got {found} for task {task}"

    row = ways.unsqueeze(-1)
    return _require(ways, (row >= 1) & (row <= num_classes), expected, (row,), message)


def _require(
    checked: Tensor,
    good: Tensor,
    expected: str,
    values: tuple[int | Tensor, ...],
    message: Callable[..., str],
) -> Tensor:
    """Returns what was checked, if all of good [..., S] holds. A compiled graph keeps but what it uses.

    `message` is called with what `values`, which broadcast to good, have where it fails first, and with the
    number of the task and the position within it.
    """
    if torch.compiler.is_compiling():
        _assert_all(good, expected)
        return checked
    if good.device.type in ("cuda", "meta") or get_proxy_mode() is not None:
        torch._assert_async(_unwrapped(good).all(), expected)
        return checked
    holds = _unwrapped(good)
    if isinstance(holds, FakeTensor) or holds.all():
        return checked
    place = tuple((~holds).nonzero()[0].tolist())
    found = [int(_unwrapped(torch.where(good, 0, value))[place]) for value in values]
    task = 0
    for index, size in zip(place[:-1], holds.shape, strict=False):
        task = task * size + index
    raise ValueError(message(*found, task, place[-1]))


# An operation, because torch.compile takes no assertion under vmap. (`torch.compiler.allow_in_graph` would do
# as well, but imports all of torch._dynamo, for a second and more, wherever this package is imported.)
@torch.library.custom_op("metafast::assert_all", mutates_args=())
def _assert_all(good: Tensor, expected: str) -> None:
    torch._assert_async(good.all(), expected)


@_assert_all.register_fake
def _(good: Tensor, expected: str) -> None:
    pass


@_assert_all.register_vmap
def _(info: Any, in_dims: tuple[int | None, None], good: Tensor, expected: str) -> tuple[None, None]:
    _assert_all(good, expected)
    return None, None


torch.fx.node.has_side_effect(torch.ops.metafast.assert_all.default)


def _unwrapped(tensor: Tensor) -> Tensor:
    """What the transforms of `torch.func` have wrapped, vmapped dimensions first, the outermost at 0."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        inner = _functorch.get_unwrapped(tensor)
        if _functorch.is_batchedtensor(tensor):
            inner = inner.movedim(_functorch.maybe_get_bdim(tensor), 0)
        tensor = inner
    return tensor
