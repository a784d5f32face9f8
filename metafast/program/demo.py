"""`metafast demo`: the commands a user would type, what they give beside the papers, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import metafast
from metafast import reference
from metafast.data import Episodes, omniglot
from metafast.data.sources import Sine
from metafast.methods import Adaptation
from metafast.program.cli import main
from metafast.program.evaluations import WAVE_SHOTS, WAVE_STEPS, draw_typical, wave_errors
from metafast.program.load import load_method
from metafast.program.run import LOG
from metafast.runs.checkpoint import list_checkpoints

_ROUNDS = 31
_WAVES = 600
_WAVE_LEARNERS = {"maml": "MAML", "reptile": "Reptile", "pretrain": "pre-trained"}
_PAPER = {"MAML": (0.67, 0.38, 0.35), "pre-trained": (2.41, 2.23, 2.19)}  # after 1, 5 and 10 steps


def demo(out: Path) -> None:
    """Two parts: waves that MAML, Reptile and pre-training learn, and Prototypical Networks on drawings.

    All is written under ``out``, where the runs of an earlier demo begin anew.
    """
    started = time.perf_counter()
    waves(out)
    drawings(out)
    print(f"{time.perf_counter() - started:.0f} s in all")


def _forget(run: Path) -> None:
    """Only the checkpoints go, so that a folder of this name that is no run loses nothing."""
    for checkpoint in list_checkpoints(run):
        checkpoint.unlink()


def waves(out: Path) -> None:
    """The sine experiment of the MAML paper at full scale, its table beside the paper's, and a picture."""
    for name in _WAVE_LEARNERS:
        _forget(out / name)
        _command("train", name, "--data", "sine", "--out", str(out / name))
    methods = {label: load_method(out / name)[0] for name, label in _WAVE_LEARNERS.items()}
    _print_errors(methods)
    picture = out / "waves.png"
    draw_typical(methods, picture)
    print(f"\n{picture}: a new wave, before and after fine-tuning")


def drawings(out: Path) -> None:
    """Trains and evaluates Prototypical Networks, times the loss against the reference, draws an episode.

    Omniglot if it is at hand or can be downloaded, else digits.
    """
    run = out / "protonet"
    _forget(run)
    on_omniglot = _omniglot_is_there()
    data = [] if on_omniglot else ["--data", "digits", "--ways", "10", "--tasks", "2", "--steps", "150"]
    most_ways = 20 if on_omniglot else 10

    _command("train", "protonet", "--out", str(run), *data)
    _command("eval", str(run), "--ways", "5")
    _command("eval", str(run), "--ways", str(most_ways), "--figure", str(out / "episode.png"))
    _compare_speed()
    print(f"\n{run / LOG}: the log of the training")


def _test_waves(shots: int, queries: int, tasks: int) -> Episodes:
    waves = Sine(shots=shots, queries=queries, tasks=tasks)
    return waves.sampler("test", seed=1, device="cpu").batch(0)


def _print_errors(methods: Mapping[str, Adaptation]) -> None:
    """Our errors, and under them the figures of Finn et al. 2017, without interval, up to 10 steps."""
    print(f"\nMean squared error on {_WAVES} new waves, after steps of fine-tuning (never adapting: 3.01):")
    print(f"{'':14}points" + "".join(f"{steps:>16}" for steps in WAVE_STEPS))
    for label, method in methods.items():
        for shots in WAVE_SHOTS:
            errors = wave_errors(method, _test_waves(shots, 100, _WAVES), WAVE_STEPS)
            print(f"{label:14}{shots:>6}" + "".join(f"{f'{error:.2f}':>16}" for error in errors))
        if label in _PAPER:
            print(f"{'  the paper':20}" + "".join(f"{error:>9.2f}{'':7}" for error in _PAPER[label]))


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
