"""What the commands `train` and `eval` do, given their options."""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from metafast.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints
from metafast.data import EpisodeSampler, omniglot_runs
from metafast.data.floors import pixel_floor
from metafast.evaluate import accuracy, evaluate
from metafast.methods import METHODS, Method
from metafast.sources import describe, load_classes
from metafast.train import train

LOG = "log.jsonl"
_FLOOR = "nearest in raw pixels, by cosine"

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


def warm_up_and_cosine(step: int, *, steps: int) -> float:
    """Share of the peak learning rate: linear up over a tenth of the steps, and down along half a cosine."""
    return min((step + 1) / (0.1 * steps), (1 + math.cos(math.pi * step / steps)) / 2)


def load_method(path: Path, device: str = "cpu", data_root: str | None = None) -> tuple[Method, Namespace]:
    """The trained method in a checkpoint (a file, or a run's folder), and the options of its run.

    Where the data lie is no part of a checkpoint: the options get ``data_root``.
    """
    checkpoint = Checkpoint.read(find_checkpoint(path))
    options = Namespace(**checkpoint.config["options"], data_root=data_root)
    method = METHODS[options.method].from_options(options, tuple(checkpoint.config["image_shape"]))
    checkpoint.restore_model(method)
    return method.to(device).eval(), options


def run_train(options: Namespace) -> None:
    """``metafast train``."""
    if list_checkpoints(options.out) and not options.resume:
        raise ValueError(f"out: {options.out} holds a run already: --resume continues it")
    torch.manual_seed(options.seed)
    classes = load_classes(options, "train")
    image_shape = tuple(classes.images.shape[2:])
    method = METHODS[options.method].from_options(options, image_shape).to(options.device)
    optimizer = torch.optim.Adam(method.parameters(), lr=options.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_and_cosine, steps=options.steps))
    sampler = EpisodeSampler(
        classes,
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        tasks=options.tasks,
        seed=options.seed,
        device=options.device,
    )
    kept = {name: value for name, value in vars(options).items() if name not in _FREE}
    checkpoints = Checkpoints(
        options.out,
        every=options.checkpoint_every,
        keep=options.keep,
        config={"options": kept, "image_shape": image_shape},
    )
    if options.resume:
        _check_same_run(checkpoints, kept)
    dtype = autocast_dtype(options.precision, options.device)
    print(
        f"{options.method} on {describe(options)} train, {len(classes)} classes: {options.ways}-way "
        f"{options.shots}-shot, {options.steps} steps, {options.device} in {dtype or torch.float32}"
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
    )
    print(find_checkpoint(options.out))


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
    dtype = autocast_dtype(options.precision, options.device)
    precision = torch.autocast(options.device, dtype, enabled=dtype is not None)
    if options.runs:
        _eval_runs(method, trained, options, precision)
    else:
        _eval_split(method, trained, options, precision)


def _eval_split(method: Method, trained: Namespace, options: Namespace, precision: torch.autocast) -> None:
    if options.episodes < 2:
        raise ValueError(f"episodes: expected at least 2 for an interval, got {options.episodes}")
    sampler = EpisodeSampler(
        load_classes(trained, options.split),
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        tasks=1,
        seed=options.seed,
        device=options.device,
    )
    with precision:
        result = evaluate(method, (sampler.batch(step) for step in range(options.episodes)))
    floor = sum(pixel_floor(sampler.batch(step)) for step in range(options.episodes)) / options.episodes
    print(
        f"{options.ways}-way {options.shots}-shot, {options.episodes} episodes of {describe(trained)} "
        f"{options.split}: {result}   ({_FLOOR}: {100 * floor:.2f} %)"
    )


def _eval_runs(method: Method, trained: Namespace, options: Namespace, precision: torch.autocast) -> None:
    if trained.data == "omniglot" and trained.protocol == "vinyals":
        raise ValueError(
            "runs: the vinyals split trains on characters of the benchmark; train with --protocol background"
        )
    runs = omniglot_runs(trained.data_root, image_size=trained.image_size).to(options.device)
    with precision:
        error = 1 - float(accuracy(method, runs).mean())
    floor = 1 - pixel_floor(runs)
    print(f"20-run one-shot benchmark: {100 * error:.2f} % error   ({_FLOOR}: {100 * floor:.2f} %)")
