"""The command line: `metafast train | eval | compare | list | info | demo`."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import metafast
from metafast.methods import METHODS
from metafast.program.console import mute

# The commands are imported when they run: `metafast info` needs none of the packages of metafast[cli].
_OF_PARSER = ("run", "parser", "command")
_EXTRA = dict.fromkeys(("matplotlib", "pydantic", "rich", "safetensors"), "cli") | {
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
    try:
        from metafast.program.options import by_option, unknown

        parser = _parser(words)
        options, left = parser.parse_known_args(words)
        if left:
            parser.error(unknown(left, options.parser))
        given = {name: value for name, value in vars(options).items() if name not in _OF_PARSER}
        return options.run(given) or 0
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _fail(f"{error.name} is not installed: pip install 'metafast[{_EXTRA[error.name]}]'")
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        return _fail(by_option(str(error), {action.dest for action in options.parser._actions}))
    except (MemoryError, RuntimeError, OverflowError, TypeError) as error:
        if not isinstance(error, (MemoryError, OverflowError)) and not _TOO_LARGE.search(str(error)):
            raise
        return _fail(f"no room for numbers as large as these: {str(error).splitlines()[0]}")


def _fail(message: str, status: int = 1) -> int:
    print(f"metafast: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser(words: Sequence[str]) -> Any:
    from metafast.program.options import Parser

    parser = Parser(
        prog="metafast", description="Meta-learning on fused operations: train a method, evaluate it, look."
    )
    parser.add_argument("--version", action="version", version=f"metafast {metafast.__version__}")
    parser.set_defaults(parser=parser, run=lambda given: parser.print_help())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a method on episodes",
        description="Trains a method on episodes, with checkpoints in the run's folder.",
        epilog="`metafast train METHOD --help` lists the options.",
    )
    methods = train.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, method in METHODS.items():
        summary = (method.__doc__ or name).splitlines()[0]
        options = methods.add_parser(name, help=summary, description=summary)
        options.set_defaults(run=_train, parser=options)
        if name in words:
            _add_train_options(options, name)
    evaluate = commands.add_parser(
        "eval",
        help="accuracy or error of a checkpoint with its 95 %% confidence interval",
        description="Accuracy of a checkpoint over episodes of classes it was not trained on; on sine "
        "its squared error on new waves; of l2l the loss that it leaves on new problems, beside SGD, "
        "RMSprop, Adam and NAG at their best rate.",
    )
    evaluate.set_defaults(run=_eval, parser=evaluate)
    if "eval" in words:
        _add_eval_options(evaluate)
    compared = commands.add_parser(
        "compare",
        help="runs beside each other on the same episodes, and beside their papers",
        description="Accuracy of several runs, or error on sine waves, on the same episodes: with 95 %% "
        "intervals, the difference from the best paired by episode, and the papers' figures.",
    )
    compared.set_defaults(run=_compare, parser=compared)
    if "compare" in words:
        _add_compare_options(compared)
    for command, run, help in (
        ("list", _list, "the methods, with their papers and what they learn from, and the data"),
        ("info", _info, "versions, CPU kernels in use, GPUs, and what each op runs on"),
        ("demo", _demo, "train, evaluate and draw, from start to end in a few minutes"),
    ):
        other = commands.add_parser(command, help=help, description=help[0].upper() + help[1:] + ".")
        other.set_defaults(run=run, parser=other)
        if command == "demo":
            other.add_argument("--out", metavar="DIR", help="default: demo")
    return parser


def _add_train_options(parser: Any, name: str) -> None:
    from metafast.program.config import defaults_of, sources_of
    from metafast.program.options import add_options
    from metafast.program.train import Pace, TrainingSettings

    method = METHODS[name]
    sources = sources_of(method)
    defaults = defaults_of(method)
    add_options(parser.add_argument_group("method"), [method.Settings], defaults)
    data = parser.add_argument_group("data")
    first = next(iter(sources))
    data.add_argument(
        f"--{method.source}",
        metavar="NAME",
        help="; ".join(f"{name}: {_summary(source)}" for name, source in sources.items())
        + f" (default: {first})",
    )
    add_options(data, list(sources.values()), defaults)
    add_options(parser.add_argument_group("training"), [TrainingSettings], defaults)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", metavar="DIR", help=f"folder of the run (default: {Path('runs', name)})".replace("%", "%%")
    )
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out, bit for bit; its options are known"
    )
    add_options(run, [Pace], defaults)
    run.add_argument(
        "--tensorboard", action="store_true", help="log for TensorBoard too, in the run's folder"
    )


def _summary(source: type) -> str:
    return source.__doc__.splitlines()[0].rstrip(".")


def _add_eval_options(parser: Any) -> None:
    from metafast.program.evaluations import EVALUATIONS
    from metafast.program.options import add_options
    from metafast.program.settings import stated

    parser.add_argument("checkpoint", metavar="RUN", help="the folder of a run, or a checkpoint file")
    _add_place_options(parser)
    parser.add_argument(
        "--runs",
        action="store_true",
        help="error on Omniglot's 20-run one-shot benchmark, instead of accuracy over episodes of the data",
    )
    defaults = {
        kind.name: {name: field.default for name, field in stated(kind).items()} for kind in EVALUATIONS
    }
    add_options(parser, EVALUATIONS, defaults)


def _add_compare_options(parser: Any) -> None:
    from metafast.program.compare import Comparison
    from metafast.program.options import add_options
    from metafast.program.settings import stated

    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or checkpoint files")
    _add_place_options(parser)
    defaults = {name: field.default for name, field in stated(Comparison).items()}
    add_options(parser, [Comparison], {"": defaults})


def _add_place_options(parser: Any) -> None:
    parser.add_argument("--data", metavar="NAME", help="data or a folder to try it on (default: as trained)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data lie (default: as in train)")
    parser.add_argument("--device", metavar="{cpu,cuda}", help="where it is computed")


def _folder(given: dict[str, Any], default: str | Path) -> Path:
    """The folder to write to."""
    word = given.pop("out", str(default))
    path = Path(word)
    nearest = next((place for place in (path, *path.absolute().parents) if place.exists()), Path())
    # Of an empty word, which a shell makes of an unset variable, ``Path`` would make the current folder.
    if not word or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"out: expected a folder to write to, there or to be made, got {word or repr(word)}")
    return path


def _train(given: dict[str, Any]) -> int | None:
    from metafast.program.run import begin
    from metafast.program.signals import Stopped

    method = given.pop("method")
    out = _folder(given, Path("runs", method))
    flags = {name: given.pop(name, False) for name in ("resume", "tensorboard")}
    try:
        begin(method, given, out=out, **flags)
    except Stopped as stopped:
        print(f"metafast: {stopped}", file=sys.stderr)
        return stopped.status


def _eval(given: dict[str, Any]) -> None:
    from metafast.program.evaluations import EVALUATIONS, evaluation_of
    from metafast.program.run import load_method
    from metafast.program.settings import read, said, stated
    from metafast.program.train import available

    path, runs = Path(given.pop("checkpoint")), given.pop("runs", False)
    device = available(given.pop("device", None))
    data, root = given.pop("data", None), given.pop("data_root", None)
    method, trained = load_method(path, device, data=data, data_root=root)
    kind = evaluation_of(method, trained, runs=runs)
    if runs and kind.name != "the 20-run benchmark":
        raise ValueError(f"runs: expected only for images, got it for {kind.name}")
    for name, value in given.items():
        if name not in stated(kind):
            having = [other for other in EVALUATIONS if name in stated(other)]
            first = [other.name for other in having if not set(other.__mro__[1:]) & set(having)]
            raise ValueError(
                f"{name}: expected only for {' or '.join(first)}, got {said(value)} for {kind.name}"
            )
    read(kind, given)(method, trained, device)


def _compare(given: dict[str, Any]) -> None:
    from metafast.program.compare import Comparison, compare
    from metafast.program.settings import read
    from metafast.program.train import available

    runs = [Path(run) for run in given.pop("runs")]
    device = available(given.pop("device", None))
    data, root = given.pop("data", None), given.pop("data_root", None)
    compare(runs, read(Comparison, given), device, data=data, data_root=root)


def _list(given: dict[str, Any]) -> None:
    from metafast.data.sources import DATA, TASKS
    from metafast.program.config import sources_of

    print("Methods, what they learn from, and their papers:")
    for name, method in METHODS.items():
        print(f"  {name:12} {', '.join(sources_of(method)):42} {method.paper}")
    for title, sources in (("Data (--data):", DATA), ("Tasks of l2l (--task):", TASKS)):
        print(f"\n{title}")
        for name, source in sources.items():
            print(f"  {name:12} {_summary(source)}")


def _info(given: dict[str, Any]) -> None:
    from metafast._dispatch.info import info

    print(info())


def _demo(given: dict[str, Any]) -> None:
    from metafast.program.demo import demo

    demo(_folder(given, "demo"))
