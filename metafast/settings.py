"""How settings are stated: typed fields of a frozen dataclass, each with its range, default and meaning.

What is stated here is all that the command line, its help, a run's configuration file and their checks know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field
from typing import Annotated, Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between two bounds, either of which may be absent: beside the type, in ``Annotated``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Mapping[str, Any]]) -> Any:
        """So pydantic checks it, which this package needs for its command line alone."""
        bounds = {name: bound for name, bound in vars(self).items() if bound is not None}
        return {**handler(source), **bounds}


Count = Annotated[int, Range(ge=1)]
Whole = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, le=2**63 - 1)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What others derive from: a field for each setting, made by :func:`setting`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"allow_inf_nan": False}


def setting(
    default: Any = MISSING,
    meaning: str = "",
    *,
    only_with: tuple[str, tuple[Any, ...]] | None = None,
    local: bool = False,
    option: bool = True,
) -> Any:
    """A field of :class:`Settings`.

    Args:
        default: a recipe for a kind of data may say another.
        meaning: a line for people.
        only_with: another setting and its values without which this one means nothing, so that whoever gives
            it then is told.
        local: true of this machine alone: no part of a run's configuration.
        option: the command line has an option for it.
    """
    stated = {"meaning": meaning, "only_with": only_with, "local": local, "option": option}
    return field(default=default, metadata=stated)


def means_something(stated: Field[Any], settings: Settings) -> bool:
    """Is the setting read at all, given the others?"""
    if stated.metadata["only_with"] is None:
        return True
    other, values = stated.metadata["only_with"]
    return getattr(settings, other) in values
