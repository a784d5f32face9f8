"""A run: begun or resumed in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from metafast.data.sources import Sampler
from metafast.methods import LearnedOptimizer
from metafast.program.config import Config, compose, read_config, rebuild_from, versions, write_config
from metafast.program.console import say
from metafast.program.distributed import Ranks
from metafast.program.evaluate import mean_score
from metafast.program.learning_curves import final_loss
from metafast.program.records import Records
from metafast.program.settings import said, write
from metafast.program.signals import Stopped, heard
from metafast.program.steps import check_graph
from metafast.program.train import autocast_dtype, available, train
from metafast.runs.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints
from metafast.runs.lock import locked
from metafast.runs.log import check_log, read_log

LOG = "log.jsonl"
CURVES = "curves.png"
_EXTENDABLE = "constant"


def begin(
    method: str, given: Mapping[str, Any], *, out: Path, resume: bool, tensorboard: bool, ranks: Ranks
) -> None:
    """``metafast train``: the run that the options describe, in the folder ``out`` of the first rank.

    Raises:
        ValueError: an option is wrong, or ``out`` holds something else, or another process trains there.
        Stopped: a signal came; the state is saved.
    """
    ranks.of_first(lambda: _check_folder(out, resume))
    base = ranks.of_first(lambda: _begun(out)) if resume else None
    config = compose(method, given, base)
    if base is not None and ranks.first:
        _check_same_run(out, config, base)
    training = config.training
    available(training.device)
    check_graph(config.pace.graph, torch.device(training.device), ranks)
    torch.manual_seed(training.seed)
    sampler = config.data.sampler("train", seed=training.seed, device=training.device)
    problem = ranks.share(sampler.batch(0)).problem
    learner = config.learner.from_settings(config.settings, problem).to(training.device)
    optimizer, scheduler = training.make_optimizer(learner)
    described = config.described(problem, config.data.digest(sampler))
    if base is not None and base["digest"] != described["digest"]:
        raise ValueError(
            f"data: {config.data} has changed since the run in {out} began; --resume needs it as it was"
        )
    pace = config.pace
    checkpoints = Checkpoints(out, every=pace.checkpoint_every, keep=pace.keep, config=described)
    dtype = autocast_dtype(training.precision, training.device)
    with (
        locked(out) if ranks.first else nullcontext(),
        heard() as signal,
        Records(out / "tensorboard" if tensorboard and ranks.first else None) as records,
    ):
        if ranks.first:
            if resume:
                say(_where(checkpoints))
            for line in _what(config, sampler, ranks):
                say(line)
            write_config(out, described)
        done = train(
            learner,
            sampler.batch,
            steps=training.steps,
            optimizer=optimizer,
            scheduler=scheduler,
            autocast=dtype,
            checkpoints=checkpoints,
            resume=resume,
            log=out / LOG,
            log_every=pace.log_every,
            result=final_loss if isinstance(learner, LearnedOptimizer) else mean_score,
            observe=records.add,
            stop=lambda: signal() is not None,
            ranks=ranks,
            graph=pace.graph,
        )
        stopped_by = ranks.largest(signal() or 0)
        if ranks.first:
            _draw_curves(out, title=f"{method} on {config.data}")
    if done < training.steps:
        raise Stopped(
            stopped_by,
            f"stopped after step {done} of {training.steps}, which is saved: `metafast train {method} --out "
            f"{out} --resume` goes on",
        )
    if ranks.first:
        say(str(find_checkpoint(out)))


def _check_folder(out: Path, resume: bool) -> None:
    """A run begins where none is, and is resumed where there is one, or where there may be one soon."""
    if resume and not out.exists():
        raise ValueError(
            f"out: {out} does not exist, so there is nothing to resume; without --resume it begins"
        )
    if list_checkpoints(out) and not resume:
        raise ValueError(f"out: {out} holds a run already: --resume continues it")
    try:
        check_log(out / LOG)
    except ValueError as error:
        raise ValueError(f"out: {error}") from None


def _what(config: Config, sampler: Sampler, ranks: Ranks) -> Iterator[str]:
    """What is trained on what."""
    data, training = config.data, config.training
    dtype = autocast_dtype(training.precision, training.device) or torch.float32
    together = f", {ranks.size} ranks" if ranks.size > 1 else ""
    yield (
        f"{config.method} on {data} train: {data.task}, {data.tasks} tasks a step, {training.steps} steps, "
        f"{training.device} in {dtype}{together}"
    )
    if (contents := data.contents("train", sampler)) is not None:
        yield contents


def _where(checkpoints: Checkpoints) -> str:
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        return f"{checkpoints.directory} holds no checkpoint yet: from the start"
    return f"{checkpoints.directory}: resumes after step {checkpoint.step}"


def _draw_curves(out: Path, *, title: str) -> None:
    """A picture of the log, of which there is none where it has fewer than two points."""
    records = [record for record in read_log(out / LOG) if "seconds" in record]
    if len(records) > 1:
        from metafast.program.figures import draw_training

        draw_training(records, out / CURVES, title=title)


def _begun(out: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, checked; ``None`` where none has begun."""
    described = read_config(out)
    if described is None and list_checkpoints(out):
        described = Checkpoint.latest(out)[1].config
    if described is not None:
        rebuild_from(out, described)
    return described


def _check_same_run(out: Path, config: Config, base: Mapping[str, Any]) -> None:
    """Options that differ from the run's would make another of it."""
    if config.method != base["method"]:
        raise ValueError(f"out: {out} holds a run of {base['method']}, not of {config.method}")
    for name, version in versions().items():
        if (began := base["versions"].get(name)) != version:
            warnings.warn(
                f"the run in {out} began with {name} {began}, this is {version}: bits may differ from "
                "those of an unbroken run",
                stacklevel=1,
            )
    for section in ("data", "settings", "training"):
        now = write(getattr(config, section))
        for name, value in base[section].items():
            if name == "name" or now.get(name) == value:
                continue
            if name == "steps" and now[name] > value:
                if config.training.schedule == _EXTENDABLE:
                    continue
                raise ValueError(
                    f"steps: the run in {out} has a {config.training.schedule} schedule, which ends after "
                    f"its {value} steps: only a {_EXTENDABLE} one goes on, got {now[name]}"
                )
            raise ValueError(
                f"{name}: the run in {out} has {said(value)}, got {said(now.get(name))}; --resume continues "
                "a run as it was begun"
            )
