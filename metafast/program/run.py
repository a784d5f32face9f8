"""A run: begun or resumed in a folder, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metafast.data.sources import Source
from metafast.methods import LearnedOptimizer, Learner
from metafast.program.config import (
    Config,
    choose_source,
    compose,
    read_config,
    rebuild,
    sources_of,
    write_config,
)
from metafast.program.evaluate import mean_score
from metafast.program.learning_curves import final_loss
from metafast.program.settings import said, stated, write
from metafast.program.train import autocast_dtype, available, is_log, train
from metafast.runs.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints

LOG = "log.jsonl"


def begin(method: str, given: Mapping[str, Any], *, out: Path, resume: bool) -> None:
    """``metafast train``: the run that the options describe, in the folder ``out``.

    Raises:
        ValueError: an option is wrong, or ``out`` holds something else.
    """
    if list_checkpoints(out) and not resume:
        raise ValueError(f"out: {out} holds a run already: --resume continues it")
    if not is_log(out / LOG):
        raise ValueError(f"out: {out / LOG} was not written by metafast: expected a folder without it")
    base = _begun(out) if resume else None
    config = compose(method, given, base)
    if base is not None:
        _check_same_run(out, config, base)
    training = config.training
    available(training.device)
    torch.manual_seed(training.seed)
    sampler = config.data.sampler("train", seed=training.seed, device=training.device)
    problem = sampler.batch(0).problem
    learner = config.learner.from_settings(config.settings, problem).to(training.device)
    optimizer, scheduler = training.make_optimizer(learner)
    described = config.described(problem)
    checkpoints = Checkpoints(
        out, every=config.pace.checkpoint_every, keep=config.pace.keep, config=described
    )
    if resume:
        checkpoint = checkpoints.latest()
        print(
            f"{out} holds no checkpoint yet: from the start"
            if checkpoint is None
            else f"{out}: resumes after step {checkpoint.step}"
        )
    dtype = autocast_dtype(training.precision, training.device)
    print(
        f"{method} on {config.data} train: {config.data.task}, {config.data.tasks} tasks a step, "
        f"{training.steps} steps, {training.device} in {dtype or torch.float32}"
    )
    write_config(out, described)
    train(
        learner,
        sampler.batch,
        steps=training.steps,
        optimizer=optimizer,
        scheduler=scheduler,
        autocast=dtype,
        checkpoints=checkpoints,
        resume=resume,
        log=out / LOG,
        log_every=config.pace.log_every,
        result=final_loss if isinstance(learner, LearnedOptimizer) else mean_score,
    )
    print(find_checkpoint(out))


def _begun(out: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, checked; ``None`` where none has begun."""
    described = read_config(out)
    if described is None:
        paths = list_checkpoints(out)
        described = Checkpoint.read(paths[-1]).config if paths else None
    if described is not None:
        _rebuild(described, out)
    return described


def _check_same_run(out: Path, config: Config, base: Mapping[str, Any]) -> None:
    """Options that differ from the run's would make another of it."""
    if config.method != base["method"]:
        raise ValueError(f"out: {out} holds a run of {base['method']}, not of {config.method}")
    for section in ("data", "settings", "training"):
        now = write(getattr(config, section))
        for name, value in base[section].items():
            if name != "name" and now.get(name) != value:
                raise ValueError(
                    f"{name}: the run in {out} has {said(value)}, got {said(now.get(name))}; --resume "
                    "continues a run as it was begun"
                )


def load_method(
    path: Path, device: str = "cpu", *, data: str | None = None, data_root: Path | None = None
) -> tuple[Learner, Config]:
    """The trained method in a checkpoint (a file, or a run's folder), and the configuration of its run.

    Args:
        data: data of the same kind to take the place of the run's.
        data_root: where the data lie, which is no part of a configuration.
    """
    found = find_checkpoint(path)
    checkpoint = Checkpoint.read(found)
    config, problem = _rebuild(checkpoint.config, found)
    method = config.learner.from_settings(config.settings, problem)
    checkpoint.restore_model(method)
    if data is not None:
        config = replace(config, data=_other(config, data))
    if data_root is not None:
        if "data_root" not in stated(type(config.data)):
            having = " or ".join(
                name for name, source in sources_of(config.learner).items() if "data_root" in stated(source)
            )
            raise ValueError(f"data_root: expected only for {having}, got {data_root} for {config.data.name}")
        config = replace(config, data=replace(config.data, data_root=data_root))
    return method.to(device).eval(), config


def _other(config: Config, name: str) -> Source:
    """The data that a name means, with the settings of the run's."""
    source, named = choose_source(config.method, name)
    if source.kind != config.data.kind:
        raise ValueError(f"data: expected {config.data.kind}, which the run has learned, got {name}")
    shared = stated(source).keys() & stated(type(config.data)).keys()
    return source(**{**{name: getattr(config.data, name) for name in shared}, **named})


def _rebuild(described: Any, where: Path) -> tuple[Config, Any]:
    try:
        return rebuild(described)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
