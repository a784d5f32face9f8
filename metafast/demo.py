"""`metafast demo`: the commands a user would type, then the speed of the fused loss, then a picture."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import metafast
from metafast import reference
from metafast.cli import main
from metafast.data import Episodes, EpisodeSampler, omniglot
from metafast.evaluate import accuracy
from metafast.figures import draw_episode
from metafast.jobs import LOG, load_method
from metafast.sources import describe, load_classes

_ROUNDS = 31
_CANDIDATES = 21  # episodes, of which one is drawn


def demo(out: Path) -> None:
    """Trains and evaluates Prototypical Networks, times the loss against the reference, draws an episode.

    Omniglot if it is at hand or can be downloaded, else digits. All is written under ``out``, whose folder
    ``run`` is made anew.
    """
    started = time.perf_counter()
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    on_omniglot = _omniglot_is_there()
    data = [] if on_omniglot else ["--data", "digits", "--ways", "10", "--tasks", "2", "--steps", "150"]
    most_ways = 20 if on_omniglot else 10

    _command("train", "protonet", "--out", str(run), *data)
    for ways in (5, most_ways):
        _command("eval", str(run), "--ways", str(ways))
    _compare_speed()
    picture = out / "episode.png"
    _draw(run, most_ways, picture)
    print(f"\n{picture}: one episode and its predictions\n{run / LOG}: the log of the training")
    print(f"{time.perf_counter() - started:.0f} s in all")


def _omniglot_is_there() -> bool:
    try:
        omniglot(split="test")
    except (ConnectionError, FileNotFoundError) as error:
        print(f"{error}\nOmniglot is neither at hand nor to be had: this is the demo on digits.")
        return False
    return True


def _command(*arguments: str) -> None:
    print("\n$ metafast", *arguments, flush=True)
    if status := main(arguments):
        raise SystemExit(status)


def _compare_speed() -> None:
    print("\nPrototypical loss, forward and backward, 1-shot, 5 queries per class, D = 64, float32:")
    for tasks, ways in ((1, 5), (64, 5), (64, 20)):
        support = torch.randn(tasks, ways, 64, requires_grad=True)
        query = torch.randn(tasks, 5 * ways, 64, requires_grad=True)
        labels = torch.arange(ways).repeat(tasks, 1)
        arguments = (support, labels, query, labels.repeat_interleave(5, dim=1), ways)
        fused, plain = _medians(metafast.prototypical_loss, reference.prototypical_loss, arguments)
        print(
            f"  {tasks:3d} x {ways:2d}-way: {1e6 * fused / tasks:7.1f} µs per episode fused, "
            f"{1e6 * plain / tasks:7.1f} µs in plain PyTorch: {plain / fused:.1f} times as fast"
        )


def _medians(
    first: Callable[..., Tensor], second: Callable[..., Tensor], arguments: tuple[Tensor | int, ...]
) -> tuple[float, float]:
    """Median seconds of forward and backward of two losses, which take turns: both see the same machine."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for loss, measured in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            loss(*arguments).backward()
            measured.append(time.perf_counter() - started)
    return median(seconds[0]), median(seconds[1])


@torch.no_grad()
def _draw(run: Path, ways: int, path: Path) -> None:
    """The median episode of some, by accuracy: neither the best nor the worst of them."""
    method, options = load_method(run)
    classes = load_classes(options, "test")
    drawn = EpisodeSampler(classes, ways=ways, shots=1, queries=1, tasks=_CANDIDATES, seed=2).batch(0)
    middle = accuracy(method, drawn).argsort(stable=True)[_CANDIDATES // 2]
    typical = Episodes(*(tensor[middle : middle + 1] for tensor in astuple(drawn)))
    title = f"A typical {ways}-way 1-shot episode of {describe(options)} test"
    draw_episode(typical, method.log_probs(typical), path, title=title)
