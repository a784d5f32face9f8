"""Whether x has a dimension of tasks: a layer that takes one example as well as a batch would not say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metafast.adaptation.examples import Examples, leaves_of
from metafast.adaptation.scratch import called

# What a layer gets of one task, and by what it is called.
_OF_TASK: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear, nn.BatchNorm1d, nn.RNNCellBase), "[S, D]"),
    ((nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.InstanceNorm1d), "[S, C, L]"),
    ((nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer), "[S, L, D]"),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d), "[S, C, H, W]"),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.BatchNorm3d), "[S, C, D, H, W]"),
)


@contextmanager
def checked(module: nn.Module, x: Examples) -> Iterator[None]:
    """Within it the layers of the module (a double) refuse x itself where it is too short for a batch."""
    given = {id(leaf) for leaf in leaves_of(x)}
    handles = []
    for name, part in module.named_modules():
        for kinds, shape in _OF_TASK:
            if isinstance(part, kinds):
                handles.append(part.register_forward_pre_hook(_check(called(name, part), shape, given)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(layer: str, shape: str, given: set[int]) -> Callable[..., None]:
    def check(part: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in given and args[0].dim() < shape.count(",") + 1:
            raise ValueError(
                f"x: expected shape [T, {shape[1:]}, for {layer} takes {shape} of a task, and got "
                f"{list(args[0].shape)}; is the dimension of tasks missing?"
            )

    return check
