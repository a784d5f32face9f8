"""What the commands `train` and `eval` do, given their options."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metafast.data import (
    Episodes,
    EpisodeSampler,
    Problem,
    QuadraticSampler,
    ScaledSampler,
    SineSampler,
    TrainingSampler,
    omniglot_runs,
)
from metafast.data.center import center
from metafast.data.floors import pixel_floor
from metafast.methods import MAML, METHODS, Adaptation, LearnedOptimizer, Learner, Method
from metafast.program.evaluate import Estimate, estimate, evaluate, mean_score, score
from metafast.program.learning_curves import RATES, RIVALS, final_loss, learned, learning_curves, tune
from metafast.program.options import Recipes, settle
from metafast.program.sources import TASKS, describe, load_optimizees, load_sampler, settle_data
from metafast.program.train import is_log, train
from metafast.runs.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints

Sampler = EpisodeSampler | SineSampler | QuadraticSampler | TrainingSampler | ScaledSampler

LOG = "log.jsonl"
_PROBLEMS_AT_ONCE = 32  # of an optimizer's evaluation
_BENCHMARK_WAYS = 20
WAVE_SHOTS, WAVE_STEPS = [5, 10], [1, 5, 10, 32]
_FLOOR = "nearest in raw pixels, by cosine"

_IMAGES, _ADAPTING, _BENCHMARK = "images", "images with an inner loop", "the 20-run benchmark"
_WAVES, _PROBLEMS = "sine waves", "problems of l2l"
_ANY: Mapping[str, Any] = {"split": "test", "seed": 1}
_EPISODES: Mapping[str, Any] = {**_ANY, "episodes": 600, "precision": None}
_OF_CLASSES: Mapping[str, Any] = {**_EPISODES, "runs": None, "ways": 5, "shots": [1], "queries": 5}
EVALUATIONS: Recipes = {
    _IMAGES: _OF_CLASSES,
    _ADAPTING: {**_OF_CLASSES, "ways": None, "inner_steps": None, "sgd": None},
    _BENCHMARK: {"runs": None, "precision": None},
    _WAVES: {**_EPISODES, "shots": WAVE_SHOTS, "queries": 100, "inner_steps": WAVE_STEPS},
    _PROBLEMS: {
        **_ANY,
        "episodes": 64,
        "task": None,
        "batch_size": None,
        "inner_steps": None,
        "figure": None,
    },
}
"""The options of each kind of evaluation, with their defaults; ``None``: as trained, or none."""

# Options that say where and how often, not what: a resumed run may change them.
_FREE = {"command", "run", "out", "resume", "data_root", "checkpoint_every", "keep", "log_every"}


def autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    """What ``--precision`` means on a device: the dtype of autocast, ``None`` for float32 throughout."""
    if precision == "auto":
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = torch.cpu.get_capabilities().get("amx_bf16", False)
        precision = "bfloat16" if fast else "float32"
    return {"float32": None, "bfloat16": torch.bfloat16}[precision]


def _linear(step: int, *, steps: int) -> float:
    return 1 - step / steps


def _warm_up_and_cosine(step: int, *, steps: int) -> float:
    return min((step + 1) / (0.1 * steps), (1 + math.cos(math.pi * step / steps)) / 2)


SCHEDULES = {"linear": _linear, "cosine": _warm_up_and_cosine}
"""Shares of the peak learning rate: linear down to zero; linear up over a tenth of the steps and down
along half a cosine."""


def load_method(path: Path, device: str = "cpu", data_root: str | None = None) -> tuple[Learner, Namespace]:
    """The trained method in a checkpoint (a file, or a run's folder), and the options of its run.

    Where the data lie is no part of a checkpoint: the options get ``data_root``.
    """
    checkpoint = Checkpoint.read(find_checkpoint(path))
    options = Namespace(**checkpoint.config["options"], data_root=data_root)
    problem = checkpoint.config["problem"] and Problem(**checkpoint.config["problem"])
    method = METHODS[options.method].from_options(options, problem)
    checkpoint.restore_model(method)
    return method.to(device).eval(), options


def run_train(options: Namespace) -> None:
    """``metafast train``."""
    if list_checkpoints(options.out) and not options.resume:
        raise ValueError(f"out: {options.out} holds a run already: --resume continues it")
    if not is_log(options.out / LOG):
        raise ValueError(
            f"out: {options.out / LOG} was not written by metafast: expected a folder without it"
        )
    torch.manual_seed(options.seed)
    sampler, problem, task = _training(options)
    method = METHODS[options.method].from_options(options, problem).to(options.device)
    optimizer = _optimizer(options, method)
    scheduler = None
    if options.schedule != "constant":
        shares = partial(SCHEDULES[options.schedule], steps=options.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
    kept = {name: value for name, value in vars(options).items() if name not in _FREE}
    checkpoints = Checkpoints(
        options.out,
        every=options.checkpoint_every,
        keep=options.keep,
        config={"options": kept, "problem": problem and asdict(problem)},
    )
    if options.resume:
        _check_same_run(checkpoints, kept)
    dtype = autocast_dtype(options.precision, options.device)
    print(
        f"{options.method} on {describe(options)} train: {task}, {options.tasks} tasks a step, "
        f"{options.steps} steps, {options.device} in {dtype or torch.float32}"
    )
    train(
        method,
        sampler.batch,
        steps=options.steps,
        optimizer=optimizer,
        scheduler=scheduler,
        autocast=dtype,
        checkpoints=checkpoints,
        resume=options.resume,
        log=options.out / LOG,
        log_every=options.log_every,
        result=final_loss if options.method == "l2l" else mean_score,
    )
    print(find_checkpoint(options.out))


def _training(options: Namespace) -> tuple[Sampler, Problem | None, str]:
    """What a method trains on, the kind of its episodes, and what it is called."""
    sizes = {"tasks": options.tasks, "seed": options.seed, "device": options.device}
    if options.method == "l2l":
        sampler = load_optimizees(
            options.task,
            "train",
            steps=options.inner_steps,
            batch_size=options.batch_size,
            random_scaling=options.random_scaling,
            data_root=options.data_root,
            **sizes,
        )
        return sampler, None, f"{options.inner_steps} inner steps"
    sampler = load_sampler(
        options, "train", ways=options.ways, shots=options.shots, queries=options.queries, **sizes
    )
    task = f"{options.shots}-shot" if options.ways is None else f"{options.ways}-way {options.shots}-shot"
    return sampler, sampler.batch(0).problem, task


def _optimizer(options: Namespace, method: Method) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[options.optimizer]
    return kind(method.parameters(), lr=options.lr, fused=True)


def _check_same_run(checkpoints: Checkpoints, kept: dict[str, object]) -> None:
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        print(f"{checkpoints.directory} holds no checkpoint yet: from the start")
        return
    for name, value in checkpoint.config["options"].items():
        if kept.get(name) != value:
            raise ValueError(
                f"{name}: the run in {checkpoints.directory} has {value!r}, got {kept.get(name)!r}; --resume "
                "continues a run as it was begun"
            )
    print(f"{checkpoints.directory}: resumes after step {checkpoint.step}")


def run_eval(options: Namespace) -> None:
    """``metafast eval``."""
    method, trained = load_method(options.checkpoint, options.device, options.data_root)
    kind = _evaluation(method, trained, options)
    settle(options, EVALUATIONS, kind)
    if isinstance(method, LearnedOptimizer):
        _eval_optimizer(method, trained, options)
        return
    settle_data(options, Namespace(data="omniglot") if options.runs else trained)
    dtype = autocast_dtype(options.precision or trained.precision, options.device)
    with torch.autocast(options.device, dtype, enabled=dtype is not None):
        if kind == _WAVES:
            _eval_waves(method, trained, options)
        elif kind == _BENCHMARK:
            _eval_runs(method, trained, options)
        else:
            _eval_split(method, trained, options)


def _evaluation(method: Learner, trained: Namespace, options: Namespace) -> str:
    """The kind of evaluation that a method, and what it learned from, ask for."""
    if isinstance(method, LearnedOptimizer):
        return _PROBLEMS
    if trained.data == "sine":
        return _WAVES
    if options.runs:
        return _BENCHMARK
    return _ADAPTING if isinstance(method, Adaptation) else _IMAGES


def _eval_optimizer(method: LearnedOptimizer, trained: Namespace, options: Namespace) -> None:
    """For each number of steps a line for the learned optimizer and one for each rival: the same problems."""
    count, lengths = options.episodes, options.inner_steps or [trained.inner_steps]
    if options.figure is not None and len(lengths) > 1:
        raise ValueError(f"figure: expected one number of inner steps, got {lengths}")
    if min(lengths) < 1:
        raise ValueError(f"inner_steps: expected at least 1, got {min(lengths)}")
    task = options.task or trained.task
    if options.batch_size is None and "batch_size" in TASKS[task]:
        options.batch_size = trained.batch_size
    settle_data(options, Namespace(task=task))
    for steps in lengths:
        sampler = load_optimizees(
            task,
            options.split,
            tasks=min(count, _PROBLEMS_AT_ONCE),
            steps=steps,
            batch_size=options.batch_size,
            seed=options.seed,
            data_root=options.data_root,
            device=options.device,
        )
        batches = [sampler.batch(index) for index in range(-(-count // _PROBLEMS_AT_ONCE))]
        batches[-1] = batches[-1].take(slice(count - sum(map(len, batches[:-1]))))
        print(
            f"Loss after {steps} steps on {count} new problems, {task} {options.split}; the rivals at the "
            f"best of {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}:"
        )
        curves = {f"l2l ({trained.task})": learning_curves(batches, learned(method.cell))}
        (ours,) = curves.values()
        print(f"  {next(iter(curves)):22} {estimate(ours[-1]):.3g}")
        for name in RIVALS:
            tuned = tune(batches, name)
            curves[name] = tuned.curves
            settings = ", ".join(f"{key} {value:.3g}" for key, value in tuned.settings.items())
            print(
                f"  {name:22} {estimate(tuned.curves[-1]):.3g}   l2l - {name}: "
                f"{estimate(ours[-1] - tuned.curves[-1]):.3g}   ({settings})"
            )
    if options.figure is not None:
        from metafast.program.figures import draw_learning_curves

        title = f"{count} new problems: {task}, {options.split}"
        draw_learning_curves(curves, options.figure, title=title)
        print(f"{options.figure}: the learning curves")


def _eval_waves(method: Adaptation, trained: Namespace, options: Namespace) -> None:
    """A line for each number of points, a column for each number of steps: all on the same waves."""
    samplers = _samplers(trained, options, ways=None, tasks=options.episodes)
    print(f"Mean squared error of {trained.method} on {options.episodes} waves, after steps of fine-tuning:")
    print("points" + "".join(f"{steps:>17}" for steps in options.inner_steps))
    for shots, sampler in samplers.items():
        errors = wave_errors(method, sampler.batch(0), options.inner_steps)
        print(f"{shots:>6}" + "".join(f"{error:>9.3f}" for error in errors))


def _samplers(
    trained: Namespace, options: Namespace, *, ways: int | None, tasks: int
) -> dict[int, EpisodeSampler | SineSampler]:
    """One for each number of shots, all made before one is used: what does not fit is said at once."""
    return {
        shots: load_sampler(
            trained,
            options.split,
            ways=ways,
            shots=shots,
            queries=options.queries,
            tasks=tasks,
            seed=options.seed,
            device=options.device,
        )
        for shots in options.shots
    }


def wave_errors(method: Adaptation, waves: Episodes, steps: Sequence[int]) -> list[Estimate]:
    """The mean squared error after each of so many steps of fine-tuning on the support."""
    return [evaluate(method, [waves], partial(method.predict, steps=count)) for count in steps]


def _eval_split(method: Method, trained: Namespace, options: Namespace) -> None:
    ways = options.ways or trained.ways
    _check_ways("ways", ways, method, trained)
    for shots, sampler in _samplers(trained, options, ways=ways, tasks=1).items():
        floor = sum(pixel_floor(sampler.batch(step)) for step in range(options.episodes)) / options.episodes
        for steps in options.inner_steps or [None]:
            after = "" if steps is None else f", {steps} inner steps"
            for rate in [None, *(options.sgd or [])]:
                learner = method if rate is None else _sgd_from(method, rate)
                predict = learner.predict if steps is None else partial(learner.predict, steps=steps)
                batches = (sampler.batch(step) for step in range(options.episodes))
                by = "" if rate is None else f", by SGD at {rate:g}"
                print(
                    f"{ways}-way {shots}-shot, {options.episodes} episodes of {describe(trained)} "
                    f"{options.split}{after}{by}: {evaluate(learner, batches, predict):.2%}   "
                    f"({_FLOOR}: {100 * floor:.2f} %)"
                )


def _check_ways(name: str, ways: int, method: Method, trained: Namespace) -> None:
    if isinstance(method, Adaptation) and ways > trained.ways:
        raise ValueError(
            f"{name}: expected at most {trained.ways} classes, as {trained.method} was trained, got {ways}"
        )


def _sgd_from(method: Adaptation, lr: float) -> Adaptation:
    """Plain gradient descent from where a method's inner loop begins, with as many steps."""
    return MAML(method.network, loss=method.loss_name, lr=lr, steps=method.test_steps)


def _eval_runs(method: Method, trained: Namespace, options: Namespace) -> None:
    if trained.data == "omniglot" and trained.protocol == "vinyals":
        raise ValueError(
            "runs: the vinyals split trains on characters of the benchmark; train with --protocol background"
        )
    _check_ways("runs", _BENCHMARK_WAYS, method, trained)
    runs = omniglot_runs(trained.data_root, image_size=trained.image_size).to(options.device)
    if trained.center:
        runs = replace(runs, support=center(runs.support), query=center(runs.query))
    error = 1 - float(score(method, runs).mean())
    floor = 1 - pixel_floor(runs)
    print(f"20-run one-shot benchmark: {100 * error:.2f} % error   ({_FLOOR}: {100 * floor:.2f} %)")
