"""The command line: `metafast train | eval | info | demo`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Sequence
from pathlib import Path

import torch

from metafast.methods import METHODS, LearnedOptimizer
from metafast.program import sources
from metafast.program.options import (
    COUNT,
    FOLDER,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Parser,
    by_option,
    say_defaults,
    settle,
    whole,
)

# The commands are imported when they run: `metafast info` needs none of the packages of metafast[cli].
_EXTRA = {"matplotlib", "rich", "safetensors"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. An error that a user can mend is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _fail(f"{error.name} is not installed: pip install 'metafast[cli]'")
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        return _fail(by_option(str(error), options))
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"metafast: error: {message}", file=sys.stderr)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="metafast", description="Meta-learning on fused operations: train a method, evaluate it, look."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    methods = commands.add_parser(
        "train",
        help="train a method on episodes",
        description="Trains a method on episodes, with checkpoints in the run's folder.",
        epilog="`metafast train METHOD --help` lists the options.",
    ).add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, method in METHODS.items():
        summary = (method.__doc__ or name).splitlines()[0]
        train = methods.add_parser(name, help=summary, description=summary)
        method.add_options(train.add_argument_group("method"))
        _add_train_options(train, name)
        learns_to_optimise = issubclass(method, LearnedOptimizer)
        say_defaults(train, sources.TASKS if learns_to_optimise else sources.DATA)
        say_defaults(train, method.recipes)
    _add_eval_options(
        commands.add_parser(
            "eval",
            help="accuracy or error of a checkpoint with its 95 %% confidence interval",
            description="Accuracy of a checkpoint over episodes of classes it was not trained on; on sine "
            "its squared error on new waves; of l2l the loss that it leaves on new problems, beside SGD, "
            "RMSprop, Adam and NAG at their best rate.",
        )
    )
    commands.add_parser(
        "info", help="versions, CPU kernels in use, GPUs, and what each op runs on"
    ).set_defaults(run=_info)
    demo = commands.add_parser("demo", help="train, evaluate and draw, from start to end in a few minutes")
    demo.add_argument("--out", type=FOLDER, default="demo", metavar="DIR", help="default: %(default)s")
    demo.set_defaults(run=_demo)
    return parser


def _add_train_options(parser: ArgumentParser, method: str) -> None:
    if issubclass(METHODS[method], LearnedOptimizer):
        problems = parser.add_argument_group("problems")
        sources.add_task_options(problems, tuple(METHODS[method].recipes))
        problems.add_argument("--tasks", type=COUNT, metavar="T", help="problems per step")
    else:
        sources.add_options(parser.add_argument_group("data"))
        episodes = parser.add_argument_group("episodes")
        episodes.add_argument("--ways", type=COUNT, metavar="N", help="classes")
        episodes.add_argument("--shots", type=COUNT, metavar="K", help="support examples per class")
        episodes.add_argument("--queries", type=COUNT, metavar="K", help="query examples per class")
        episodes.add_argument("--tasks", type=COUNT, metavar="T", help="per step")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=COUNT, metavar="N")
    training.add_argument("--optimizer", choices=("adam", "sgd"), help="of the outer loop")
    training.add_argument("--lr", type=POSITIVE, metavar="X", help="of the optimizer, its peak")
    training.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        help="of the learning rate: linear falls to 0; cosine warms up, then falls along a cosine",
    )
    training.add_argument("--seed", type=SEED, default=0, metavar="N", help="default: %(default)s")
    _add_machine_options(training)

    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=FOLDER,
        default=str(Path("runs", method)),
        metavar="DIR",
        help="folder of the checkpoints and of log.jsonl (default: %(default)s)",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out, bit for bit, with the same options"
    )
    run.add_argument("--checkpoint-every", type=COUNT, metavar="N", help="steps")
    run.add_argument(
        "--keep", type=COUNT, default=2, metavar="N", help="latest checkpoints (default: %(default)s)"
    )
    run.add_argument("--log-every", type=COUNT, metavar="N", help="steps")
    parser.set_defaults(run=_train)


def _add_eval_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or the folder of a run")
    parser.add_argument(
        "--runs",
        action="store_true",
        default=None,
        help="error on Omniglot's 20-run one-shot benchmark, instead of accuracy over episodes of the data",
    )
    parser.add_argument("--data-root", metavar="DIR", help=sources.DATA_ROOT_HELP)
    parser.add_argument("--split", metavar="NAME", help="of the data (default: test)")
    parser.add_argument(
        "--episodes",
        type=whole(2),
        metavar="N",
        help="or waves (default: 600), or problems of l2l (default: 64)",
    )
    parser.add_argument(
        "--task", choices=sources.TASKS, help="what an optimizer of l2l is tried on (default: as trained)"
    )
    parser.add_argument(
        "--batch-size",
        type=COUNT,
        metavar="B",
        help="examples that a network of the task sees in a step (default: as trained)",
    )
    parser.add_argument(
        "--figure", type=Path, metavar="PATH", help="draw the learning curves of l2l and of its rivals"
    )
    parser.add_argument(
        "--ways", type=COUNT, metavar="N", help="classes (default: 5; with an inner loop as trained)"
    )
    parser.add_argument(
        "--shots",
        type=COUNT,
        nargs="+",
        metavar="K",
        help="support examples per class (default: 1; of a wave 5 10)",
    )
    parser.add_argument(
        "--queries", type=COUNT, metavar="K", help="query examples per class (default: 5; of a wave 100)"
    )
    parser.add_argument(
        "--inner-steps",
        type=whole(0),
        nargs="+",
        metavar="K",
        help="steps of adaptation (default: as trained; on sine 1 5 10 32)",
    )
    parser.add_argument(
        "--sgd",
        type=NOT_NEGATIVE,
        nargs="+",
        metavar="X",
        help="also the same steps of plain SGD at these learning rates, from the same initialisation",
    )
    parser.add_argument("--seed", type=SEED, metavar="N", help="default: 1")
    _add_machine_options(parser)
    parser.set_defaults(run=_eval)


def _add_machine_options(parser: ArgumentParser | _ArgumentGroup) -> None:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument(
        "--device",
        default=devices[-1],
        choices=devices,
        help="of those here; the default is %(default)s",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of the backbone; auto is bfloat16 where the hardware multiplies it",
    )


def _train(options: Namespace) -> None:
    from metafast.program.jobs import run_train

    recipes, kind = METHODS[options.method].recipes, sources.kind(options)
    if kind not in recipes:
        raise ValueError(f"data: {options.method} learns from {' or '.join(recipes)}, got {options.data!r}")
    sources.settle_data(options, options)
    settle(options, recipes, kind)
    run_train(options)


def _eval(options: Namespace) -> None:
    from metafast.program.jobs import run_eval

    run_eval(options)


def _info(options: Namespace) -> None:
    from metafast._dispatch.info import info

    print(info())


def _demo(options: Namespace) -> None:
    from metafast.program.demo import demo

    demo(options.out)
