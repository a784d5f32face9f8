"""Every method that learns from images, on Omniglot: how well, how fast, and what the operations give it.

Each is trained by its recipe, or a share of its steps; `--runs DIR` takes those that have a run in
DIR/METHOD, and leaves the others out. It is evaluated on 5-way episodes of the test split, with as many shots
as it was trained with and a 95 % interval, beside what its paper reports; a recurrent one also by how often
the first, second, ... example of a class in a sequence is classified right. Episodes per second are those of
a training step (loss, gradient, optimizer), with metafast's operations and with their twins of
metafast.reference in their place, interleaved; before that both have to give the same gradient. Peak memory
is that of a fresh process that trains, torch and the images in it.

All recipes take hours, so `python -m bench` leaves this out. `--only METHOD` runs one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common.budget import Budget, stop_at_sigterm
from bench.common.cases import wrong_by
from bench.common.clock import Clock, Plan, interleave
from bench.common.memory import MIB
from bench.common.report import Report
from bench.common.run import QUICK, parse
from metafast import reference
from metafast.methods import METHODS, Learner
from metafast.methods.sequence import RecurrentLearner
from metafast.program.config import Config, compose
from metafast.program.evaluate import Estimate, estimate, evaluate
from metafast.program.load import load_method
from metafast.program.run import LOG
from metafast.program.train import autocast_dtype
from metafast.runs.log import read_log

DATA, WAYS, QUERIES = "omniglot", 5, 5
PLAN = Plan(variant_s=3.0, max_rounds=21)
TOLERANCE = 1e-3  # of the gradient, in float32
MEMORY_STEPS = 2  # after which a step takes no more memory than the one before


@dataclass
class Row:
    """A method in the table."""

    method: str
    paper: str
    shots: int
    accuracy: Estimate
    reported: float | None
    steps: int
    train_s: float
    peak_bytes: int
    ops: list[str]  # of metafast that a training step calls
    episodes_per_second: float
    reference_episodes_per_second: float | None  # None: it calls none
    by_instance: list[Estimate] | None  # of a method that reads sequences

    def cells(self) -> tuple[str, ...]:
        slow = self.reference_episodes_per_second
        return (
            self.method,
            f"{WAYS}w{self.shots}s",
            f"{self.accuracy:.2%}",
            "" if self.reported is None else f"{100 * self.reported:.1f} %",
            str(self.steps),
            f"{self.train_s:.0f}",
            f"{self.peak_bytes / MIB:.0f}",
            f"{self.episodes_per_second:.4g}",
            "no op" if slow is None else f"{slow:.4g}",
            "" if slow is None else f"{self.episodes_per_second / slow:.2f}",
            self.paper,
        )


COLUMNS = (
    "method",
    "task",
    "accuracy",
    "paper",
    "steps",
    "train s",
    "peak MiB",
    "episodes/s",
    "reference",
    "ratio",
    "source",
)


def measure(name: str, options: argparse.Namespace, folder: Path) -> Row:
    run, peak = trained(name, options, folder / name)
    device = str(options.device)
    method, config = load_method(run, device)
    reported = config.learner.reported.get((config.data.name, WAYS, config.data.shots))
    records = [record for record in read_log(run / LOG) if "seconds" in record]
    used, fused, plain = speed(method, config, options)
    method, _ = load_method(run, device)  # as it was before steps were timed
    recurrent = isinstance(method, RecurrentLearner)
    return Row(
        method=name,
        paper=config.learner.paper,
        shots=config.data.shots,
        accuracy=accuracy(method, config, options),
        reported=reported,
        steps=records[-1]["step"],
        train_s=records[-1]["seconds"],
        peak_bytes=peak,
        ops=used,
        episodes_per_second=fused,
        reference_episodes_per_second=plain,
        by_instance=by_instance(method, config, options) if recurrent else None,
    )


# --- training -----------------------------------------------------------------------------------------------


def trained(name: str, options: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """A run, and the peak memory of training it."""
    if options.runs is not None:
        return options.runs / name, train(name, options, folder, MEMORY_STEPS)
    steps = compose(name, {"data": DATA}).training.steps
    return folder, train(name, options, folder, max(MEMORY_STEPS, round(options.steps_share * steps)))


# Stands between this process and the one that trains, which begins with the peak of what starts it.
_LAUNCHER = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def train(name: str, options: argparse.Namespace, folder: Path, steps: int) -> int:
    """Trains a method in a process of its own, and gives the most memory that it had, in bytes."""
    words = [sys.executable, "-c", _LAUNCHER]
    words += [sys.executable, "-m", "metafast", "train", name, "--data", DATA, "--out", str(folder)]
    words += ["--steps", str(steps), "--device", options.device.type]
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        words, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        peak, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return int(peak) * 1024


def autocast(config: Config, options: argparse.Namespace) -> torch.autocast:
    device = options.device.type
    dtype = autocast_dtype(config.training.precision, device)
    return torch.autocast(device, dtype, enabled=dtype is not None)


def accuracy(method: Learner, config: Config, options: argparse.Namespace) -> Estimate:
    data = replace(config.data, tasks=1, ways=WAYS, queries=QUERIES)
    sampler = data.sampler("test", seed=1, device=str(options.device))
    with autocast(config, options):
        return evaluate(method, map(sampler.batch, range(options.episodes)))


def by_instance(method: RecurrentLearner, config: Config, options: argparse.Namespace) -> list[Estimate]:
    sampler = replace(config.data, tasks=1).sampler("test", seed=1, device=str(options.device))
    torch.manual_seed(0)  # of the order of a sequence
    method.eval()
    with torch.no_grad():
        rows = [method.accuracy_by_instance(sampler.batch(step)) for step in range(options.episodes)]
    return [estimate(column) for column in torch.cat(rows).unbind(1)]


# --- speed --------------------------------------------------------------------------------------------------


def speed(
    method: Learner, config: Config, options: argparse.Namespace
) -> tuple[list[str], float, float | None]:
    """The operations that a training step calls, and episodes per second with them and without."""
    sampler = config.data.sampler("train", seed=config.training.seed, device=str(options.device))
    episodes = sampler.batch(0)
    method.train()
    expected, found = gradient(method, episodes), []
    used: set[str] = set()
    with in_reference(used.add):
        found = gradient(method, episodes)
    if (error := wrong_by([found], [expected.double()])) > TOLERANCE:
        raise ValueError(f"the gradient by the reference differs by {error:.1e}")
    optimizer, _ = config.training.make_optimizer(method)

    def fused() -> None:
        optimizer.zero_grad()
        with autocast(config, options):
            loss = method.loss(episodes)
        loss.backward()
        optimizer.step()

    def plain() -> None:
        with in_reference():
            fused()

    calls: dict[str, Callable[[], None]] = {"fused": fused, **({"plain": plain} if used else {})}
    samples = interleave(calls, Clock(options.device), QUICK if options.quick else PLAN)
    rates = {name: len(episodes) / statistics.median(seconds) for name, seconds in samples.items()}
    return sorted(used), rates["fused"], rates.get("plain")


def gradient(method: Learner, episodes: Any) -> Tensor:
    """Of the loss, all in one vector."""
    torch.manual_seed(0)  # of methods that draw random numbers
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(method.loss(episodes), parameters, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


@contextmanager
def in_reference(note: Callable[[str], object] = lambda name: None) -> Iterator[None]:
    """Within it, the methods call metafast.reference where they call metafast's operations."""

    def twin(name: str, *args: Any, **options: Any) -> Any:
        note(name)
        return getattr(reference, name)(*args, **options)

    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith(("metafast.methods.", "metafast.optim."))
        for name in reference.__all__
        if name in vars(module)
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, partial(twin, name))
    try:
        yield
    finally:
        for (module, name), operation in zip(places, before, strict=True):
            setattr(module, name, operation)


# --- the table ----------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def instances(row: Row) -> str:
    return f"{row.method} by instance: {', '.join(f'{each:.1%}' for each in row.by_instance)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="trained runs, each in a folder METHOD: of these"
    )
    parser.add_argument(
        "--steps-share", type=float, default=1.0, metavar="X", help="of the recipes' steps (%(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=600, metavar="N", help="of the test (%(default)s)")


def main() -> None:
    options = parse("methods", __doc__, add_options)
    if options.quick:
        options.steps_share, options.episodes = 0.002, 10
    stop_at_sigterm()
    names = [name for name, method in METHODS.items() if "images" in method.recipes and options.only in name]
    if options.runs is not None:
        names = [name for name in names if (options.runs / name).is_dir()]
    budget, rows, failed = Budget(options.seconds, [1] * len(names)), [], []
    with Report("methods", options) as report, tempfile.TemporaryDirectory() as folder:
        for name in names:
            if budget.share() is None:
                report.say(f"{name}: no time left")
                continue
            try:
                row = measure(name, options, Path(folder))
            except Exception as error:  # a method that fails leaves the others
                failed.append(name)
                report.say(f"{name}: {type(error).__name__}: {error}")
                continue
            rows.append(row)
            report.add(asdict(row))
            print("  ".join(row.cells()), flush=True)
        report.say(f"\n{options.episodes} test episodes, {QUERIES} queries a class\n{table(rows)}")
        for row in rows:
            if row.by_instance is not None:
                report.say(instances(row))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
