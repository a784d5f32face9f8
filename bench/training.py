"""A step of `metafast train`, all of it: drawing a batch, the gradient, the optimizer, the log.

The loop of the command line trains each recipe of RECIPES, on a GPU as it is written and as a CUDA graph that
is replayed. Beside MAML's sine waves stand the same steps by hand: the same batches, batched products with
Hessian-vector products (bench/inner_loop/peers/by_hand.py), torch's fused Adam; on a GPU in a CUDA graph too.
Both begin at the same weights and have to agree after some steps. The variants train in turns, and a row is
the median of these.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.budget import Budget, Deadline, stop_at_sigterm
from bench.common.clock import Clock
from bench.common.cuda_graph import graphed
from bench.common.report import Report
from bench.common.run import parse
from bench.inner_loop.peers.by_hand import bmm_by_hand
from bench.inner_loop.workloads import LEARNING_RATE, Problem
from metafast.program.config import Config, compose
from metafast.program.steps import Graph
from metafast.program.train import autocast_dtype, train

TURNS, CHECKED_STEPS, TOLERANCE = 5, 20, 1e-3


@dataclass(frozen=True)
class Recipe:
    method: str
    data: str
    steps: int  # of a turn
    by_hand: bool = False
    target_ms: float | None = None  # of a step on an H200


RECIPES = (
    Recipe("maml", "sine", 500, by_hand=True, target_ms=0.1),  # the paper's 70,000 iterations in 7 s
    Recipe("reptile", "sine", 300),
    Recipe("maml", "omniglot", 10),
    Recipe("protonet", "omniglot", 10),
)

Trainer = Callable[[int], float]  # trains so many steps; seconds of one


def started(config: Config, device: torch.device) -> tuple[Any, nn.Module]:
    """The sampler and the method at its first weights."""
    torch.manual_seed(config.training.seed)
    sampler = config.data.sampler("train", seed=config.training.seed, device=str(device))
    return sampler, config.learner.from_settings(config.settings, sampler.batch(0).problem).to(device)


def by_the_loop(config: Config, device: torch.device, graph: Graph) -> tuple[nn.Module, Trainer]:
    sampler, method = started(config, device)

    def run(steps: int) -> float:
        """Twice as many, of which the first are not timed: a graph is recorded in them."""
        seconds: list[float] = []

        def observe(record: Mapping[str, Any]) -> None:
            seconds.append(record["seconds"])

        optimizer, scheduler = replace(config.training, steps=2 * steps).make_optimizer(method)
        autocast = autocast_dtype(config.training.precision, device.type)
        how = {"optimizer": optimizer, "scheduler": scheduler, "autocast": autocast, "graph": graph}
        with contextlib.redirect_stderr(io.StringIO()):  # its progress
            train(method, sampler.batch, steps=2 * steps, log_every=steps, observe=observe, **how)
        return (seconds[1] - seconds[0]) / steps

    return method, run


def by_hand(config: Config, device: torch.device, graph: bool) -> tuple[nn.Module, Trainer]:
    """MAML on sine waves."""
    sampler, method = started(config, device)
    if config.settings.inner_lr != LEARNING_RATE:
        raise ValueError(f"inner_lr: expected {LEARNING_RATE}, as by hand, got {config.settings.inner_lr}")
    params = list(method.parameters())

    def data(step: int) -> list[Tensor]:
        drawn = sampler.batch(step)
        return [drawn.support, drawn.support_labels, drawn.query, drawn.query_labels]

    kept = data(0)
    steps = config.settings.inner_steps
    gradient = bmm_by_hand(Problem(params, *kept, loss="mse", steps=steps, first_order=False))

    def run(steps: int) -> float:
        optimizer = torch.optim.Adam(params, lr=config.training.lr, fused=True, capturable=graph)
        done = 0

        def step() -> None:
            _, *grads = gradient()
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()

        def captured() -> Callable[[], None]:
            changes = [param.detach() for param in params]
            before = [change.clone() for change in changes]
            step()  # makes the optimizer's state
            state = [tensor.zero_() for of in optimizer.state.values() for tensor in of.values()]
            torch._foreach_copy_(changes, before)
            return graphed(step, [*changes, *state])

        once = captured() if graph else step

        def some() -> None:
            nonlocal done
            for _ in range(steps):
                torch._foreach_copy_(kept, data(done))
                once()
                done += 1

        some()
        return Clock(device)(some) / steps

    return method, run


def variants(recipe: Recipe, device: torch.device) -> dict[str, tuple[nn.Module, Trainer]]:
    config = compose(recipe.method, {"data": recipe.data, "device": device.type})
    cuda = device.type == "cuda"
    found = {"metafast train": by_the_loop(config, device, "off")}
    if cuda:
        found["metafast train, as a CUDA graph"] = by_the_loop(config, device, "on")
    if recipe.by_hand:
        found["by hand"] = by_hand(config, device, graph=False)
    if recipe.by_hand and cuda:
        found["by hand, in a CUDA graph"] = by_hand(config, device, graph=True)
    return found


def check(recipe: Recipe, device: torch.device) -> None:
    """Do all variants come to the same weights?"""
    ends = {}
    for name, (method, run) in variants(recipe, device).items():
        run(CHECKED_STEPS)
        ends[name] = nn.utils.parameters_to_vector(method.parameters()).detach()
    first, *others = ends.values()
    for name, end in zip(list(ends)[1:], others, strict=True):
        if (error := ((end - first).norm() / first.norm()).item()) > TOLERANCE:
            raise ValueError(f"{name}: the weights differ by {error:.1e} after {2 * CHECKED_STEPS} steps")


def measure(recipe: Recipe, options: argparse.Namespace, report: Report, deadline: Deadline) -> None:
    if recipe.by_hand or options.device.type == "cuda":
        check(recipe, options.device)
    steps, turns = (3, 1) if options.quick else (recipe.steps, TURNS)
    trainers = {name: run for name, (_, run) in variants(recipe, options.device).items()}
    samples: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(turns):
        if turn and deadline.left() <= 0:
            break
        for name, run in trainers.items():
            samples[name].append(1e3 * run(steps))
    title = f"{recipe.method} on {recipe.data}"
    report.say(f"\n{title}\n  {'':<34} {'median ms':>10} {'best ms':>9}")
    medians = {name: statistics.median(times) for name, times in samples.items()}
    for name, times in samples.items():
        report.say(f"  {name:<34} {medians[name]:10.4g} {min(times):9.4g}")
        report.add({"recipe": title, "name": name, "median_ms": medians[name], "best_ms": min(times)})
    if recipe.target_ms is not None and options.device.type == "cuda":
        reached = min(ms for name, ms in medians.items() if name.startswith("metafast"))
        word = "met   " if reached <= recipe.target_ms else "MISSED"
        report.say(f"  {word} at most {recipe.target_ms:g} ms a step on an H200: {reached:.3g}")


def main() -> None:
    options = parse("training", __doc__)
    stop_at_sigterm()
    chosen = [recipe for recipe in RECIPES if options.only in f"{recipe.method} on {recipe.data}"]
    budget, failed = Budget(options.seconds, [1] * len(chosen)), False
    with Report("training", options) as report:
        for recipe in chosen:
            if (deadline := budget.share()) is None:
                report.say(f"\n{recipe.method} on {recipe.data}: no time left")
                continue
            try:
                measure(recipe, options, report, deadline)
            except Exception as error:  # a recipe that fails leaves the others
                failed = True
                report.say(f"\n{recipe.method} on {recipe.data}: {type(error).__name__}: {error}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
