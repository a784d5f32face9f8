"""The command line: `metafast train | eval | compare | list | info | demo`."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr

import metafast
from metafast.program.commands import COMMANDS
from metafast.program.console import mute
from metafast.program.options import Parser, by_option, unknown

_EXTRAS = dict.fromkeys(("matplotlib", "pydantic", "rich", "safetensors"), "cli") | {
    "tensorboard": "tensorboard"
}
# What torch says of numbers that no memory is large enough for.
_TOO_LARGE = re.compile("alloc|out of memory|overflow|too large|Trying to create tensor", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. An error that a user can mend is one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ±, a path that is no UTF-8
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"metafast: warning: {message}\n"
    try:
        status = _main(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        mute(sys.stdout)
        return 128 + 13  # as of a program that SIGPIPE ended
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def _main(words: list[str]) -> int:
    parser = _parser()
    with _said_once():
        options, left = parser.parse_known_args(words)
        if left:
            parser.error(unknown(left, options.parser))
    given = {name: value for name, value in vars(options).items() if name not in ("command", "parser")}
    try:
        return options.parser.run(given) or 0
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _fail(f"{error.name} is not installed: pip install 'metafast[{_EXTRAS[error.name]}]'")
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        return _fail(by_option(str(error), {action.dest for action in options.parser._actions}))
    except (MemoryError, RuntimeError, OverflowError, TypeError) as error:
        if not isinstance(error, (MemoryError, OverflowError)) and not _TOO_LARGE.search(str(error)):
            raise
        return _fail(f"no room for numbers as large as these: {str(error).splitlines()[0]}")


def _said_once() -> AbstractContextManager[object]:
    """Of processes that torchrun started with the same words, the first says what is wrong with them."""
    first = os.environ.get("RANK", "0") == "0"
    return nullcontext() if first else redirect_stderr(io.StringIO())


def _fail(message: str, status: int = 1) -> int:
    print(f"metafast: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="metafast",
        description="Meta-learning on fused operations: train a method, evaluate it, look.",
        run=lambda given: parser.print_help(),
    )
    parser.add_argument("--version", action="version", version=f"metafast {metafast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        commands.add_parser(
            command.name,
            help=command.help.replace("%", "%%"),
            description=command.description,
            fill=command.add_options,
            run=command.run,
        )
    return parser
