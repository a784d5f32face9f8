"""The data sets that the command line offers, by name."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metafast.data import (
    EpisodeSampler,
    ImageClasses,
    QuadraticSampler,
    ScaledSampler,
    SineSampler,
    TrainingSampler,
    digits,
    image_folder,
    omniglot,
)
from metafast.data.networks import elman_rnn, relu_cnn, sigmoid_mlp
from metafast.data.resize import resize_area
from metafast.program.options import COUNT, NOT_NEGATIVE, Recipes, settle

DATA_ROOT_HELP = "where the data lie, and are downloaded to (default: METAFAST_DATA, else the user's cache)"
_SPLITS = ("train", "val", "test")  # of what is drawn without end
_DIGITS_TRAIN = 90  # of the 174 to 183 drawings of each digit

DATA: Recipes = {
    "omniglot": {"protocol": "vinyals", "image_size": 28, "data_root": None},
    "digits": {"image_size": 28, "data_root": None},
    "a folder": {"image_size": 28},
    "sine": {},
}
"""What episodes are drawn from, with the options that belong to it."""

_TRAINING: Mapping[str, Any] = {"batch_size": 128, "data_root": None}
TASKS: Recipes = {
    "quadratic": {},
    "digits-mlp": _TRAINING,
    "digits-cnn": _TRAINING,
    "digits-rnn": _TRAINING,
    "omniglot-mlp": _TRAINING,
}
"""What learned optimizers optimise, with the options that belong to it: 10-d quadratics, and the training of
small networks."""
_OMNIGLOT_SIDE, _OMNIGLOT_WAYS = 14, 10


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="omniglot",
        metavar="NAME",
        help="omniglot; digits (tested on new drawings of the same ten classes); a folder with train/ and "
        "test/, in which every class is a folder of images; or sine (regression of sine waves) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=("vinyals", "alphabets", "background"),
        help="omniglot's split: as in the papers' tables, by alphabet, or all of background for the 20-run "
        "benchmark",
    )
    parser.add_argument("--image-size", type=COUNT, metavar="PIXELS", help="side of the images")
    parser.add_argument(
        "--center",
        action=BooleanOptionalAction,
        help="move every drawing's centre of mass to the middle of its image",
    )
    parser.add_argument("--data-root", metavar="DIR", help=DATA_ROOT_HELP)


def add_task_options(parser: ArgumentParser, tasks: Sequence[str]) -> None:
    parser.add_argument("--task", default=tasks[0], choices=tasks, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=COUNT, metavar="B", help="examples that a network sees in a step"
    )
    parser.add_argument(
        "--random-scaling",
        type=NOT_NEGATIVE,
        metavar="X",
        help="every coordinate in units of its own, exp(-X) to exp(X), against overfitting to the task",
    )
    parser.add_argument("--data-root", metavar="DIR", help=DATA_ROOT_HELP)


def describe(options: Namespace) -> str:
    """The data set and its protocol, or a learned optimizer's task, for people."""
    if "task" in options:
        return options.task
    return f"omniglot ({options.protocol})" if options.data == "omniglot" else options.data


def settle_data(options: Namespace, data: Namespace) -> None:
    """Gives the options above that were not given their defaults, for the data set or task that ``data``
    names; refuses those that belong to others."""
    if "task" in data:
        settle(options, TASKS, data.task)
    else:
        settle(options, DATA, data.data if data.data in DATA else "a folder")


def kind(options: Namespace) -> str:
    """``"sine"`` or ``"images"``, or a learned optimizer's task: what the recipes of the methods are for."""
    if "task" in options:
        return options.task
    return "sine" if options.data == "sine" else "images"


def load_sampler(
    options: Namespace,
    split: str,
    *,
    ways: int | None,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    device: torch.device | str,
) -> EpisodeSampler | SineSampler:
    """Draws episodes of a split, by the options above.

    Raises:
        ValueError: there is no such split or data set, or a size does not fit it.
    """
    sizes = {"shots": shots, "queries": queries, "tasks": tasks, "device": device}
    if kind(options) == "images":
        return EpisodeSampler(load_classes(options, split), ways=ways, seed=seed, **sizes)
    if ways is not None:
        raise ValueError(f"ways: sine waves have no classes, got {ways}")
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {_SPLITS} for sine, got {split!r}")
    # The splits have streams of their own: a test's waves were not trained on, whatever the seeds.
    return SineSampler(seed=len(_SPLITS) * seed + _SPLITS.index(split), **sizes)


def load_optimizees(
    task: str,
    split: str,
    *,
    tasks: int,
    steps: int,
    batch_size: int | None,
    random_scaling: float = 0.0,
    seed: int,
    data_root: str | None,
    device: torch.device | str,
) -> QuadraticSampler | TrainingSampler | ScaledSampler:
    """Draws the problems of one of :data:`TASKS`; quadratics have neither ``batch_size`` nor ``data_root``.

    The networks are trained on the drawings of the split: digits of all ten classes, or ten characters that
    are drawn anew for each batch.

    Raises:
        ValueError: there is no such split, or a size is out of range.
    """
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {_SPLITS} for {task}, got {split!r}")
    sizes = {"tasks": tasks, "steps": steps, "seed": len(_SPLITS) * seed + _SPLITS.index(split)}
    if task == "quadratic":
        sampler = QuadraticSampler(device=device, **sizes)
    elif task == "omniglot-mlp":
        classes = omniglot(data_root, split=split, image_size=_OMNIGLOT_SIDE).to(device)
        network = sigmoid_mlp(_OMNIGLOT_SIDE**2, [20], _OMNIGLOT_WAYS)
        sampler = TrainingSampler(network, classes, ways=_OMNIGLOT_WAYS, batch_size=batch_size, **sizes)
    else:
        networks = {
            "digits-mlp": sigmoid_mlp(64, [20], 10),
            "digits-cnn": relu_cnn(8, [8, 16], 10),
            "digits-rnn": elman_rnn(8, 32, 10),
        }
        if task not in networks:
            raise ValueError(f"task: expected one of {tuple(TASKS)}, got {task!r}")
        classes = _digits_split(digits(data_root), split, 8).to(device)
        sampler = TrainingSampler(networks[task], classes, batch_size=batch_size, **sizes)
    return ScaledSampler(sampler, size=random_scaling, seed=sizes["seed"]) if random_scaling else sampler


def load_classes(options: Namespace, split: str) -> ImageClasses:
    """The classes of a split, by the options above.

    Raises:
        ValueError: there is no such split or data set.
    """
    size = options.image_size
    if options.data == "omniglot":
        classes = omniglot(options.data_root, protocol=options.protocol, split=split, image_size=size)
    elif options.data == "digits":
        classes = _digits_split(digits(options.data_root), split, size)
    elif Path(options.data).is_dir():
        classes = image_folder(Path(options.data, split), image_size=size)
    else:
        raise ValueError(f"data: expected 'omniglot', 'digits', 'sine' or a folder, got {options.data!r}")
    return classes.centered() if options.center else classes


def _digits_split(classes: ImageClasses, split: str, size: int) -> ImageClasses:
    """All ten digits in both splits, but other drawings: five digits are too few to learn new ones from."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test' for digits, got {split!r}")
    images = resize_area(classes.images, size, size)
    if split == "train":
        return ImageClasses(images[:, :_DIGITS_TRAIN], classes.names)
    return ImageClasses(images[:, _DIGITS_TRAIN:], classes.names, classes.counts - _DIGITS_TRAIN)
