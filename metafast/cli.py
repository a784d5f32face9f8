"""The command line: `metafast train | eval | info | demo`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Sequence
from pathlib import Path

import torch

from metafast import sources
from metafast.methods import METHODS

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
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"metafast: error: {message}", file=sys.stderr)
    return status


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
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
    _add_eval_options(
        commands.add_parser(
            "eval",
            help="accuracy of a checkpoint with its 95 %% confidence interval",
            description="Accuracy of a checkpoint over episodes of classes it was not trained on.",
        )
    )
    commands.add_parser(
        "info", help="versions, CPU kernels in use, GPUs, and what each op runs on"
    ).set_defaults(run=_info)
    demo = commands.add_parser("demo", help="train, evaluate and draw, from start to end in a few minutes")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    demo.set_defaults(run=_demo)
    return parser


def _add_train_options(parser: ArgumentParser, method: str) -> None:
    sources.add_options(parser.add_argument_group("data"))

    episodes = parser.add_argument_group("episodes")
    _add_episode_options(episodes, ways=60)
    episodes.add_argument("--tasks", type=int, default=1, metavar="T", help="per step (default: %(default)s)")

    training = parser.add_argument_group(
        "training (Adam; the learning rate warms up, then falls along a cosine)"
    )
    training.add_argument("--steps", type=int, default=600, metavar="N", help="default: %(default)s")
    training.add_argument(
        "--lr", type=float, default=2e-3, metavar="X", help="its peak (default: %(default)s)"
    )
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    _add_machine_options(training)

    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        default=Path("runs", method),
        metavar="DIR",
        help="folder of the checkpoints and of log.jsonl (default: %(default)s)",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue the run in --out, bit for bit, with the same options"
    )
    run.add_argument(
        "--checkpoint-every", type=int, default=200, metavar="N", help="steps (default: %(default)s)"
    )
    run.add_argument(
        "--keep", type=int, default=2, metavar="N", help="latest checkpoints (default: %(default)s)"
    )
    run.add_argument("--log-every", type=int, default=20, metavar="N", help="steps (default: %(default)s)")
    parser.set_defaults(run=_train)


def _add_eval_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or the folder of a run")
    parser.add_argument(
        "--runs",
        action="store_true",
        help="error on Omniglot's 20-run one-shot benchmark, instead of accuracy over episodes of the data",
    )
    parser.add_argument("--data-root", metavar="DIR", help=sources.DATA_ROOT_HELP)
    parser.add_argument("--split", default="test", metavar="NAME", help="of the data (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=600, metavar="N", help="default: %(default)s")
    _add_episode_options(parser, ways=5)
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    _add_machine_options(parser)
    parser.set_defaults(run=_eval)


def _add_episode_options(parser: ArgumentParser | _ArgumentGroup, *, ways: int) -> None:
    parser.add_argument("--ways", type=int, default=ways, metavar="N", help="classes (default: %(default)s)")
    parser.add_argument(
        "--shots", type=int, default=1, metavar="K", help="support examples per class (default: %(default)s)"
    )
    parser.add_argument(
        "--queries", type=int, default=5, metavar="K", help="query examples per class (default: %(default)s)"
    )


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
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the backbone; auto is bfloat16 where the hardware multiplies it (default: %(default)s)",
    )


def _train(options: Namespace) -> None:
    from metafast.jobs import run_train

    run_train(options)


def _eval(options: Namespace) -> None:
    from metafast.jobs import run_eval

    run_eval(options)


def _info(options: Namespace) -> None:
    from metafast._info import info

    print(info())


def _demo(options: Namespace) -> None:
    from metafast.demo import demo

    demo(options.out)
