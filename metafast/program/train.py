"""The training loop: any method, any stream of episodes; resumable bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metafast.methods import Learner
from metafast.program.distributed import Ranks
from metafast.program.evaluate import mean_score
from metafast.program.progress import Progress
from metafast.program.steps import Batch, CapturedSteps, Graph, Steps, graphs_for
from metafast.runs.checkpoint import Checkpoints
from metafast.runs.log import Log
from metafast.settings import Count, Positive, Seed, Settings, setting


def available(device: str | None) -> str:
    """The device that is asked for, by default a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device is not None and device not in devices:
        raise ValueError(f"device: expected {' or '.join(devices)}, of which there is one here, got {device}")
    return device or devices[-1]


Precision = Literal["auto", "float32", "bfloat16"]
PRECISION = "of the backbone; auto is bfloat16 where the hardware multiplies it"
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """What a run is, besides its method and its data: the same settings give the same bits."""

    steps: Count = setting(1000, "of the optimizer")
    optimizer: Literal["adam", "sgd"] = setting("adam", "of the outer loop")
    lr: Positive = setting(1e-3, "of the optimizer, its peak")
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "of the learning rate: linear falls to 0; cosine warms up, then falls along a cosine"
    )
    seed: Seed = setting(0, "of the weights and of the data")
    device: Device = setting(available(None), "where it is computed")
    precision: Precision = setting("auto", PRECISION)

    def make_optimizer(self, method: Learner) -> tuple[Optimizer, LRScheduler | None]:
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.optimizer]
        optimizer = kind(method.parameters(), lr=self.lr, fused=True)
        if self.schedule == "constant":
            return optimizer, None
        share = {"linear": _linear, "cosine": _warm_up_and_cosine}[self.schedule]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share, steps=self.steps))


def _linear(step: int, *, steps: int) -> float:
    """Shares of the peak learning rate, down to zero."""
    return 1 - step / steps


def _warm_up_and_cosine(step: int, *, steps: int) -> float:
    """Up over a tenth of the steps and down along half a cosine."""
    return min((step + 1) / (0.1 * steps), (1 + math.cos(math.pi * step / steps)) / 2)


@dataclass(frozen=True, kw_only=True)
class Pace(Settings):
    """How a run goes, whatever comes of it: a resumed run may change it."""

    log_every: Count = setting(20, "steps between two records of the log")
    checkpoint_every: Count = setting(200, "steps between two checkpoints")
    keep: Count = setting(2, "latest checkpoints")
    graph: Graph = setting(
        "auto", "a step on a GPU is recorded as a CUDA graph and repeated: on, off, or where it can be"
    )


def autocast_dtype(precision: Precision, device: str) -> torch.dtype | None:
    """What ``--precision`` means on a device: the dtype of autocast, ``None`` for float32 throughout."""
    if precision == "auto":
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = torch.cpu.get_capabilities().get("amx_bf16", False)
        precision = "bfloat16" if fast else "float32"
    return {"float32": None, "bfloat16": torch.bfloat16}[precision]


ALONE = Ranks()


def train(
    method: Learner,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    autocast: torch.dtype | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    log: Path | None = None,
    log_every: int = 20,
    result: Callable[[Learner, Batch], tuple[str, float]] = mean_score,
    observe: Callable[[Mapping[str, Any]], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    graph: Graph = "off",
) -> int:
    """Trains ``method`` in place for ``steps`` steps of ``optimizer``.

    Args:
        batches: the episodes of step 0, 1, ...: a function of the step alone, such as
            ``EpisodeSampler(...).batch``, so that a resumed run sees the episodes it would have seen.
        scheduler: stepped once after every step of the optimizer.
        autocast: the lower precision to train in, such as ``torch.bfloat16``; ``None``: as the weights are.
        checkpoints: where and how often the state is saved; also after the last step.
        resume: continue from the latest of ``checkpoints``, with the bits that an unbroken run would have;
            from the start if there is none yet.
        log: a file of JSON lines as :mod:`metafast.runs.log` has them, a record every ``log_every`` steps and
            one for every step in which tasks diverged. A resumed run drops the records after its checkpoint
            and goes on from there; one that begins drops them all.
        result: the name and value of the figure in the log beside the loss, of the batch of that step: the
            accuracy, or in regression the mean squared error, in evaluation mode.
        observe: called with every record of the log.
        stop: asked after each step; once it says so, the state is saved and training ends.
        ranks: the processes that train together, each with the same arguments, as
            :func:`metafast.program.distributed.joined` gives them. The first alone writes and observes.
        graph: ``"on"`` records a step as a CUDA graph, after a few that are taken as they are written, and
            then repeats that: the device is waited for before a record, a checkpoint, and every 100 steps.
            Batches are then all of one shape, and ``method.loss`` waits for no value of a tensor and keeps no
            state in Python from step to step. ``"auto"`` does so on CUDA where it can, and says why where
            not. The weights have the same bits as with ``"off"``.

    Returns:
        The steps that are done: ``steps``, or fewer where ``stop`` said so.

    A task whose loss or gradient is not finite, because its inner loop diverged, is left out: the step goes
    by the other tasks of its batch, and the log gets a record of the step and how many were left out.

    Raises:
        ValueError: ``log`` is a file that is no such log, or damaged; it stays as it is. Or a batch has fewer
            tasks than there are ranks; or ``graph="on"``, and there is no GPU, there are several ranks, or a
            step cannot be recorded.
        OSError: a checkpoint or a record could not be written. Of these, ConnectionError: another rank has
            ended.
        FloatingPointError: no task of a batch has a finite loss and gradient. The step is logged and not
            taken, so that the weights stay as they were.
    """
    for name, value in (("steps", steps), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if resume and checkpoints is None:
        raise ValueError("resume: expected checkpoints to resume from, got none")

    first = 0
    if resume and (checkpoint := ranks.of_first(checkpoints.latest)) is not None:
        checkpoint.restore(method, optimizer, scheduler)
        first = checkpoint.step
    ranks.begin(method)
    journal = Log(log if ranks.first else None, keep_until=first)

    device = optimizer.param_groups[0]["params"][0].device
    loss = method.loss
    if autocast is not None:
        precision = torch.autocast(device.type, autocast)
        loss, result = precision(loss), precision(result)
    method.train()
    clock = _Clock(journal.seconds)
    done = first
    with Progress(first, steps, quiet=not ranks.first) as progress:

        def note(**record: Any) -> None:
            if ranks.first:
                written = journal.write(**record)
                progress.report(written)
                observe(written)

        graphs = graphs_for(graph, device, ranks, progress.tell)
        rated = graphs is not None or device.type == "cuda"
        taker = Steps(method, loss, batches, optimizer, scheduler, ranks, note, rated=rated)
        if graphs is not None:
            every = [log_every] if checkpoints is None else [log_every, checkpoints.every]
            taker = CapturedSteps(
                taker, graphs, every=every, last=steps, stop=stop, needed=graph == "on", tell=progress.tell
            )
        while done < steps:
            taken = taker.take(done)
            done = taken.done
            clock.count(taken.tasks)
            progress.advance(done, taken.loss)

            last = done == steps or ranks.largest(stop()) > 0
            if done % log_every == 0 or done == steps:
                name, figure = result(method, taken.batch)
                figure = ranks.mean(figure, len(taken.batch))
                note(step=done, loss=taken.loss, **{name: figure}, lr=taken.lr, **clock.read())
            if ranks.first and checkpoints is not None and (done % checkpoints.every == 0 or last):
                checkpoints.save(done, method, optimizer, scheduler)
            if last:
                break
    return done


class _Clock:
    """The time that a run has taken, in all its parts, and the speed since it was last read."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._started = self._read = time.perf_counter()
        self._episodes = 0

    def count(self, episodes: int) -> None:
        self._episodes += episodes

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = self._episodes / (now - self._read)
        self._read, self._episodes = now, 0
        return {"episodes_per_second": rate, "seconds": self._before + now - self._started}
