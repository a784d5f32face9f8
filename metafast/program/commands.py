"""The commands: what each is called, its options, and what it does with those that are given.

What a command needs is imported when it runs: `metafast info` needs none of the packages of metafast[cli].
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from metafast.methods import METHODS

Given = dict[str, Any]
"""Name of an option -> the word, or the words, after it."""


@dataclass(frozen=True)
class Command:
    """One of `metafast`'s commands.

    Attributes:
        help: a line, for the list of all.
        description: for its own help.
        add_options: to its parser, when it is called.
        run: given what was typed; returns the exit status, ``None`` as 0.
    """

    name: str
    help: str
    description: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Given], int | None]


# --- train --------------------------------------------------------------------------------------------------


def _add_methods(parser: ArgumentParser) -> None:
    parser.epilog = "`metafast train METHOD --help` lists the options."
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, method in METHODS.items():
        summary = (method.__doc__ or name).splitlines()[0]
        methods.add_parser(
            name, help=summary, description=summary, fill=partial(_add_train_options, name), run=_train
        )


def _add_train_options(name: str, parser: ArgumentParser) -> None:
    from metafast.program.config import defaults_of, sources_of
    from metafast.program.options import add_options
    from metafast.program.train import Pace, TrainingSettings

    method = METHODS[name]
    sources = sources_of(method)
    defaults = defaults_of(method)
    add_options(parser.add_argument_group("method"), [method.Settings], defaults)
    data = parser.add_argument_group("data")
    each = "; ".join(f"{name}: {_summary(source)}" for name, source in sources.items())
    data.add_argument(f"--{method.source}", metavar="NAME", help=f"{each} (default: {next(iter(sources))})")
    add_options(data, list(sources.values()), defaults)
    add_options(parser.add_argument_group("training"), [TrainingSettings], defaults)
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help=f"folder of the run (default: {Path('runs', name)})")
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out, bit for bit; its options are known"
    )
    add_options(run, [Pace], defaults)
    run.add_argument(
        "--tensorboard", action="store_true", help="log for TensorBoard too, in the run's folder"
    )


def _train(given: Given) -> int | None:
    from metafast.program.distributed import joined
    from metafast.program.run import begin
    from metafast.program.signals import Stopped

    method = given.pop("method")
    flags = {name: given.pop(name, False) for name in ("resume", "tensorboard")}
    try:
        with joined() as ranks:
            begin(method, given, out=_folder(given, Path("runs", method)), ranks=ranks, **flags)
    except Stopped as stopped:
        print(f"metafast: {stopped}", file=sys.stderr)
        return stopped.status


# --- eval ---------------------------------------------------------------------------------------------------


def _add_eval_options(parser: ArgumentParser) -> None:
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


def _eval(given: Given) -> None:
    from metafast.program.evaluations import EVALUATIONS, evaluation_of
    from metafast.program.load import load_method
    from metafast.program.settings import read, said, stated

    path, runs = Path(given.pop("checkpoint")), given.pop("runs", False)
    device, place = _place(given)
    method, trained = load_method(path, device, **place)
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


# --- compare ------------------------------------------------------------------------------------------------


def _add_compare_options(parser: ArgumentParser) -> None:
    from metafast.program.compare import Comparison
    from metafast.program.options import add_options
    from metafast.program.settings import stated

    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or checkpoint files")
    _add_place_options(parser)
    defaults = {name: field.default for name, field in stated(Comparison).items()}
    add_options(parser, [Comparison], {"": defaults})


def _compare(given: Given) -> None:
    from metafast.program.compare import Comparison, compare
    from metafast.program.settings import read

    runs = [Path(run) for run in given.pop("runs")]
    device, place = _place(given)
    compare(runs, read(Comparison, given), device, **place)


# --- list, info, demo ---------------------------------------------------------------------------------------


def _list(given: Given) -> None:
    from metafast.data.sources import DATA, TASKS
    from metafast.program.config import sources_of

    print("Methods, what they learn from, and their papers:")
    learned = {name: ", ".join(sources_of(method)) for name, method in METHODS.items()}
    width = max(map(len, learned.values()))
    for name, method in METHODS.items():
        print(f"  {name:12} {learned[name]:{width}}  {method.paper}")
    for title, sources in (("Data (--data):", DATA), ("Tasks of l2l (--task):", TASKS)):
        print(f"\n{title}")
        for name, source in sources.items():
            print(f"  {name:12} {_summary(source)}")


def _info(given: Given) -> None:
    from metafast._dispatch.info import info

    print(info())


def _demo(given: Given) -> None:
    from metafast.program.demo import demo

    demo(_folder(given, "demo"))


COMMANDS = (
    Command(
        "train",
        "train a method on episodes",
        "Trains a method on episodes; the run's folder gets its configuration, log, checkpoints and curves.",
        _add_methods,
        lambda given: None,  # a method of it is called
    ),
    Command(
        "eval",
        "accuracy or error of a run with its 95 % confidence interval",
        "Accuracy of a run over episodes of classes it was not trained on; on sine its squared error on new "
        "waves; of l2l the loss that it leaves on new problems, beside SGD, RMSprop, Adam and NAG at their "
        "best rate.",
        _add_eval_options,
        _eval,
    ),
    Command(
        "compare",
        "runs beside each other on the same episodes, and beside their papers",
        "Accuracy of several runs, or error on sine waves, on the same episodes: with 95 % intervals, the "
        "difference from the best paired by episode, and the papers' figures.",
        _add_compare_options,
        _compare,
    ),
    Command(
        "list",
        "the methods, with their papers and what they learn from, and the data",
        "Lists the methods, with their papers and what they learn from, and the data.",
        lambda parser: None,
        _list,
    ),
    Command(
        "info",
        "versions, CPU kernels in use, GPUs, and what each op runs on",
        "Prints versions, CPU kernels in use, GPUs, and what each op runs on.",
        lambda parser: None,
        _info,
    ),
    Command(
        "demo",
        "train, evaluate and draw, from start to end in a few minutes",
        "Trains, evaluates and draws, from start to end in a few minutes.",
        lambda parser: parser.add_argument("--out", metavar="DIR", help="folder of it all (default: demo)"),
        _demo,
    ),
)


# --- what they share ----------------------------------------------------------------------------------------


def _summary(source: type) -> str:
    return source.__doc__.splitlines()[0].rstrip(".")


def _add_place_options(parser: ArgumentParser) -> None:
    parser.add_argument("--data", metavar="NAME", help="data or a folder to try it on (default: as trained)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data lie (default: as in train)")
    parser.add_argument("--device", metavar="{cpu,cuda}", help="where it is computed")


def _place(given: Given) -> tuple[str, dict[str, Any]]:
    """The device, and what else the options say of where a run is tried."""
    from metafast.program.train import available

    return available(given.pop("device", None)), {
        name: given.pop(name) for name in ("data", "data_root") if name in given
    }


def _folder(given: Given, default: str | Path) -> Path:
    """The folder to write to."""
    word = given.pop("out", str(default))
    path = Path(word)
    nearest = next((place for place in (path, *path.absolute().parents) if place.exists()), Path())
    # Of an empty word, which a shell makes of an unset variable, ``Path`` would make the current folder.
    if not word or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"out: expected a folder to write to, there or to be made, got {word or repr(word)}")
    return path
