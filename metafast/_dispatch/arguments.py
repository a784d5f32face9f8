"""The values and types of arguments, where torch's own messages would not name them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor


def check_not_negative(**numbers: object) -> None:
    """Refuses a negative number, as `torch.optim` does. A tensor passes: on CUDA its value is far away."""
    for name, number in numbers.items():
        if isinstance(number, (int, float)) and not number >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number}")


def check_count(least: int = 0, **counts: object) -> None:
    """Refuses what is no integer, with a TypeError, and an integer below `least`, with a ValueError."""
    for name, count in counts.items():
        _expect(hasattr(count, "__index__"), name, "an integer", repr(count))
        if count < least:
            raise ValueError(f"{name}: expected a number >= {least}, got {count}")


def check_choice(choices: Collection[str], **chosen: object) -> None:
    """Refuses with a ValueError what is none of the choices."""
    for name, choice in chosen.items():
        if choice not in tuple(choices):
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {choice!r}")


def check_instance(kind: type, **values: object) -> None:
    """Refuses with a TypeError what is no instance of the class."""
    for name, value in values.items():
        _expect(isinstance(value, kind), name, kind.__name__, kind_of(value))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt, Real))


def kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list, which can be gone through again where a generator cannot.

    Raises:
        TypeError: one tensor, names, or nothing to go through. The elements are left to `blame`.
    """
    if type(tensors) not in (list, tuple):
        plain = isinstance(tensors, Iterable) and not isinstance(tensors, (str, Tensor, Mapping))
        _expect(plain, name, "a sequence of tensors", kind_of(tensors))
    return list(tensors)


def blame(
    tensors: Mapping[str, object] | None = None,
    lists: Mapping[str, Sequence[object]] | None = None,
    integers: Mapping[str, object] | None = None,
    numbers: Mapping[str, object] | None = None,
    strings: Mapping[str, object] | None = None,
    flags: Mapping[str, object] | None = None,
) -> None:
    """Says of a call that failed which argument is of a wrong type, if one is: the entry points of
    metafast._C print all of them. Not before a call of an op, which it would slow down.

    Raises:
        TypeError: for the first, by its name.
    """
    for name, value in (tensors or {}).items():
        _expect(isinstance(value, Tensor), name, "a tensor", kind_of(value))
    for name, value in (lists or {}).items():
        for i, element in enumerate(value):
            _expect(isinstance(element, Tensor), f"{name}[{i}]", "a tensor", kind_of(element))
    for name, value in (integers or {}).items():
        _expect(hasattr(value, "__index__"), name, "an integer", repr(value))
    for name, value in (numbers or {}).items():
        _expect(is_number(value), name, "a number", repr(value))
    for name, value in (strings or {}).items():
        _expect(isinstance(value, str), name, "a string", kind_of(value))
    for name, value in (flags or {}).items():
        _expect(hasattr(value, "__bool__"), name, "True or False", repr(value))


def _expect(holds: bool, name: str, expected: str, got: str) -> None:
    if not holds:
        raise TypeError(f"{name}: expected {expected}, got {got}") from None
