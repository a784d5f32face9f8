"""Options of the command line: what values they take, and what data they belong to."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Recipes = Mapping[str, Mapping[str, Any]]
"""Kind of data -> option -> its default, ``None`` where something else gives one. An option that some kinds
name and others do not belongs to the kinds that name it."""

Value = TypeVar("Value")


class Parser(ArgumentParser):
    """Refuses a command line in one line, that begins with the option's name."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"metafast: error: {message.removeprefix('argument ')}\n")


def checked(
    read: Callable[[str], Value], expected: str, holds: Callable[[Value], bool]
) -> Callable[[str], Value]:
    """A ``type`` of argparse: the values that ``read`` makes of a word and for which ``holds`` is true."""

    def value_of(word: str) -> Value:
        try:
            value = read(word)
            fits = holds(value)
        except ValueError:
            fits = False
        if not fits:
            raise ArgumentTypeError(f"expected {expected}, got {word or repr(word)}")
        return value

    return value_of


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The whole numbers from ``least`` to ``most``."""
    expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    return checked(int, f"a whole number {expected}", lambda value: least <= value <= most)


COUNT = whole(1)
SEED = whole(0, 2**63 - 1)
FINITE = checked(float, "a finite number", math.isfinite)
POSITIVE = checked(float, "a finite number > 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = checked(float, "a finite number >= 0", lambda value: 0 <= value < math.inf)
SHARE = checked(float, "a number between 0 and 1", lambda value: 0 < value < 1)


def _path(word: str) -> Path:
    """Of an empty word, which a shell makes of an unset variable, ``Path`` would make the current folder."""
    if not word:
        raise ValueError("a path has at least one character")
    return Path(word)


def _can_be_folder(path: Path) -> bool:
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


FOLDER = checked(_path, "a folder to write to, there or to be made", _can_be_folder)


def settle(options: Namespace, recipes: Recipes, kind: str) -> None:
    """Gives the options that were not given what the recipe of ``kind`` says.

    Raises:
        ValueError: an option was given that belongs to other kinds alone.
    """
    for name, value in vars(options).items():
        owners = [owner for owner, recipe in recipes.items() if name in recipe]
        if kind in owners:
            if value is None:
                setattr(options, name, recipes[kind][name])
        elif owners and value is not None:
            expected = " or ".join(owners)
            raise ValueError(f"{name}: expected only for {expected}, got {_said(value)} for {kind}")


def say_defaults(parser: ArgumentParser, recipes: Recipes) -> None:
    """Adds to the help of an option what it is by default, and for which data where that depends on them."""
    for action in parser._actions:
        values = {kind: recipe[action.dest] for kind, recipe in recipes.items() if action.dest in recipe}
        known = {kind: _said(value) for kind, value in values.items() if value is not None}
        if known:
            alike = len(known) == len(values) and len(set(known.values())) == 1
            each = ", ".join(f"{kind} {value}" for kind, value in known.items())
            default = next(iter(known.values())) if alike else each
            action.help = f"{action.help or ''} (default: {default})".lstrip()


def _said(value: Any) -> str:
    """A value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def by_option(message: str, options: Namespace) -> str:
    """The message of an error that begins with the names of arguments, as in ``shots + queries: expected``:
    with those of the options."""
    names = re.match(r"\w+(?: \+ \w+)*(?=: )", message)
    if names is None or not all(name in options for name in names[0].split(" + ")):
        return message
    flags = re.sub(r"\w+", lambda name: "--" + name[0].replace("_", "-"), names[0])
    return flags + message[names.end() :]
