"""Options of the command line, made of settings."""

from __future__ import annotations

import re
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    _ArgumentGroup,
)
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from metafast.program.settings import items_of, nearest, said, stated, types_of
from metafast.settings import Settings

Defaults = Mapping[str, Mapping[str, Any]]
"""Kind -> name of a setting -> its default."""


class Parser(ArgumentParser):
    """Refuses a command line in one line, that begins with the option's name. Words stay as they are typed:
    what they mean, and whether they may, is the settings' to say.

    Args:
        fill: adds the options, when there is something to parse: importing what all need takes a while.
        run: what is done with them; the parser of the command that was called is ``parser`` in the namespace.
    """

    def __init__(
        self,
        *,
        run: Callable[[dict[str, Any]], int | None],
        fill: Callable[[ArgumentParser], None] = lambda parser: None,
        **arguments: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, argument_default=SUPPRESS, **arguments)
        self.run = run
        self._fill: Callable[[ArgumentParser], None] | None = fill
        self.set_defaults(parser=self)

    def parse_known_args(self, *arguments: Any, **named: Any) -> tuple[Namespace, list[str]]:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(*arguments, **named)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"metafast: error: {message.removeprefix('argument ')}\n")

    def _check_value(self, action: Action, value: Any) -> None:
        """A command or method that is misspelt: argparse would list all there are."""
        if action.choices is not None and value not in action.choices:
            raise ArgumentError(
                None,
                f"{value}: unknown {action.metavar.lower()}{nearest(value, list(action.choices))}; "
                f"`{self.prog} --help` lists them",
            )

    def options(self) -> Iterable[str]:
        return self._option_string_actions


def add_options(
    parser: ArgumentParser | _ArgumentGroup, classes: Sequence[type[Settings]], defaults: Defaults
) -> None:
    """An option for each setting of the classes, which may share some.

    Args:
        defaults: of the settings by kind of data, where a kind has them.
    """
    for name, field in stated(*classes).items():
        if not field.metadata["option"]:
            continue
        hint = next(types_of(cls)[name] for cls in classes if name in types_of(cls))
        option = "--" + name.replace("_", "-")
        help = f"{field.metadata['meaning']}{_default(name, defaults)}".replace("%", "%%")
        if hint is bool:
            parser.add_argument(option, action=BooleanOptionalAction, help=help)
        else:
            items = items_of(hint)
            nargs = {} if items is None else {"nargs": "+"}
            parser.add_argument(option, metavar=_metavar(items or hint), help=help, **nargs)


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    kind = (get_args(hint) or (hint,))[0]
    return {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind]


def _default(name: str, defaults: Defaults) -> str:
    """What it is by default, and for which data where that depends on them."""
    values = {kind: known[name] for kind, known in defaults.items() if name in known}
    there = {kind: said(value) for kind, value in values.items() if value not in (None, ())}
    if not there:
        return ""
    if len(there) == len(values) and len(set(there.values())) == 1:
        return f" (default: {next(iter(there.values()))})"
    return f" (default: {', '.join(f'{kind} {value}' for kind, value in there.items())})"


def by_option(message: str, names: Iterable[str]) -> str:
    """The message of an error that begins with the names of settings, as in ``shots + queries: expected``:
    with those of the options."""
    found = re.match(r"\w+(?: \+ \w+)*(?=: )", message)
    if found is None or not set(found[0].split(" + ")) <= set(names):
        return message
    flags = re.sub(r"\w+", lambda name: "--" + name[0].replace("_", "-"), found[0])
    return flags + message[found.end() :]


def unknown(words: Iterable[str], parser: Parser) -> str:
    """The error of words that are left over: the first, and the option that is like it."""
    word = next((word for word in words if word.startswith("-")), None)
    if word is None:
        return f"{next(iter(words))}: expected an option"
    option = word.partition("=")[0]
    return f"{option}: unknown{nearest(option, list(parser.options()))}"
