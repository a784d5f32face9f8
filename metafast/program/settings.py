"""Settings as text: read from words or JSON, with their faults told on one line, and written as JSON."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from functools import cache, partial
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from metafast.settings import Range, Settings, means_something

if TYPE_CHECKING:
    from pydantic import TypeAdapter

S = TypeVar("S", bound=Settings)
T = TypeVar("T")
Fault = Mapping[str, Any]
"""What pydantic says of one."""


def read(cls: type[S], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> S:
    """The settings with the values ``given``, words or JSON; the others by ``defaults``, else their own.

    Raises:
        ValueError: a setting is unknown, of another type, out of range, or means nothing beside the others.
            The message begins with its name.
    """
    check_names(given, stated(cls))
    values = {**(defaults or {}), **given}
    settings = _validated(cls, values, partial(_explain, cls))
    for field in fields(cls):
        if field.name in given and not means_something(field, settings):
            other, wanted = field.metadata["only_with"]
            raise ValueError(
                f"{field.name}: expected only with {other} {_either(wanted)}, got {said(given[field.name])} "
                f"with {said(getattr(settings, other))}"
            )
    return settings


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Any dataclass, of values that JSON has; raises ``ValueError`` as :func:`read`."""
    check_names(values, [field.name for field in fields(kind)])
    return _validated(
        kind, values, lambda fault: f"{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}"
    )


def write(settings: Settings) -> dict[str, Any]:
    """What JSON keeps of the settings: all but those that mean nothing beside the others, or only here."""
    kept = {
        field.name
        for field in fields(settings)
        if means_something(field, settings) and not field.metadata["local"]
    }
    written = _adapter(type(settings)).dump_python(settings, mode="json")
    return {name: value for name, value in written.items() if name in kept}


def stated(*classes: type[Settings]) -> dict[str, Field[Any]]:
    """The fields of all the classes, by name."""
    return {field.name: field for cls in classes for field in fields(cls)}


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Raises ``ValueError`` for a name that is not known, and says which known one is like it."""
    for name in given:
        if name not in known:
            raise ValueError(f"{name}: unknown{nearest(name, known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """`` (did you mean ...?)``, or nothing where no known name is like it."""
    alike = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {alike[0]}?)" if alike else ""


def said(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(said, value))
    return repr(value) if value == "" else str(value)


def _validated(kind: type[T], values: Mapping[str, Any], explain: Callable[[Fault], str]) -> T:
    """Raises ``ValueError`` for the first of the faults, as it is explained."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(explain(error.errors(include_url=False)[0])) from None


@cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter  # of metafast[cli], which a list of commands does not need

    return TypeAdapter(cls)


@cache
def types_of(cls: type[Settings]) -> dict[str, Any]:
    """The type of each field, with its range; of one that may be ``None`` the type that it has else."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: _not_none(hints[field.name]) for field in fields(cls)}


def _not_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
    return hint


def items_of(hint: Any) -> Any | None:
    """The type of the elements of a tuple; ``None`` of another type."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _explain(cls: type[Settings], fault: Fault) -> str:
    if not fault["loc"]:  # two settings that do not go together
        return str(fault["ctx"]["error"])
    name = str(fault["loc"][0])
    return f"{name}: expected {_expected(types_of(cls)[name])}, got {said(fault['input'])}"


def _expected(hint: Any) -> str:
    """The values of a type, in words."""
    if (element := items_of(hint)) is not None:
        return _expected(element)
    if get_origin(hint) is Literal:
        return _either(get_args(hint))
    ranges = [extra for extra in get_args(hint)[1:] if isinstance(extra, Range)] or [Range()]
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return _in_range(kind, ranges[0]) if kind in (int, float) else {bool: "true or false"}.get(kind, "a path")


def _in_range(kind: type[float], bounds: Range) -> str:
    if kind is int:
        least, most = bounds.ge, bounds.le
        if most is None:
            return "a whole number" if least is None else f"a whole number of at least {least}"
        return f"a whole number from {least} to {most}"
    if bounds.gt is not None and bounds.lt is not None:
        return f"a number between {bounds.gt} and {bounds.lt}"
    signs = {">": bounds.gt, ">=": bounds.ge, "<": bounds.lt, "<=": bounds.le}
    limits = " and ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)
    return f"a finite number {limits}".rstrip()


def _either(values: Collection[Any]) -> str:
    *first, last = map(said, values)
    return f"{', '.join(first)} or {last}" if first else last
