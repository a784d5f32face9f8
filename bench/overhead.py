"""What a call costs beside its kernel, in microseconds: by entry point, by kind of autograd function.

The call that is timed works on a few numbers, so that its kernel takes some ten nanoseconds and all the rest
is the call. Beside it stand the same call on a 5-way 1-shot episode of 64 features, whose kernel takes a few
microseconds, and operations of torch for scale.

Last, a meta-step alone and beside three busy processes on the same two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import metafast
from bench.common.budget import Budget, stop_at_sigterm
from bench.common.cases import Skip
from bench.common.clock import Clock, Plan, interleave
from bench.common.report import Report
from bench.common.run import parse
from bench.inner_loop.peers import by_hand, in_jax
from bench.inner_loop.workloads import SINE, metafast_call
from metafast import _C

ops = torch.ops.metafast

BUDGET_US = 6.0  # what an eager call may cost over its kernel


CHOSEN = ("pybind typed entry", "C++ Function")  # what metafast does
RIVALS = (
    "torch.ops, .default",
    "torch.ops, packet",
    "ctx-style Python Function",
    "setup_context Python Function",
)


class Cost(NamedTuple):
    """Microseconds per call."""

    median: float
    best: float


# --- the same kernels under Python autograd functions -------------------------------------------------------


class CtxFunction(torch.autograd.Function):
    """The older style: forward saves. It cannot be used inside torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, metric: str) -> Tensor:
        out = _C.pairwise(x, y, None, None, metric)
        ctx.save_for_backward(x, y, out)
        ctx.metric = metric
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, out = ctx.saved_tensors
        grads = ops.pairwise_backward.default(grad, x, y, None, None, out, ctx.metric)
        return grads[0], grads[1], None


class SetupContextFunction(torch.autograd.Function):
    """The style that composes with torch.func."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, metric: str) -> Tensor:
        return _C.pairwise(x, y, None, None, metric)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.metric = inputs
        ctx.save_for_backward(x, y, output)

    backward = staticmethod(CtxFunction.backward)


# --- what is timed -----------------------------------------------------------------------------------------

Calls = dict[str, Callable[[], object]]


def pairwise_calls(x: Tensor, y: Tensor) -> dict[str, Calls]:
    gx, gy = x.clone().requires_grad_(), y.clone().requires_grad_()
    out = _C.pairwise(x, y, None, None, "sqeuclidean")
    grad = torch.ones_like(out)

    entries: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pybind typed entry": lambda x, y: _C.pairwise(x, y, None, None, "sqeuclidean"),
        "torch.ops, .default": lambda x, y: ops.pairwise.default(x, y, None, None, "sqeuclidean"),
        "torch.ops, packet": lambda x, y: ops.pairwise(x, y, None, None, "sqeuclidean"),
        "metafast.pairwise_distance": metafast.pairwise_distance,
    }
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "C++ Function": entries["pybind typed entry"],
        "ctx-style Python Function": lambda x, y: CtxFunction.apply(x, y, "sqeuclidean"),
        "setup_context Python Function": lambda x, y: SetupContextFunction.apply(x, y, "sqeuclidean"),
        "metafast.pairwise_distance": metafast.pairwise_distance,
    }

    def with_backward(forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(gx, gy), (gx, gy), grad)

    return {
        "pairwise, no gradient": {n: lambda f=f: f(x, y) for n, f in entries.items()}
        | {"torch.cdist": lambda: torch.cdist(x, y), "torch.add": lambda: torch.add(x, x)},
        "pairwise, requires_grad": {n: lambda f=f: f(gx, gy) for n, f in functions.items()}
        | {"torch.cdist": lambda: torch.cdist(gx, gy), "torch.add": lambda: torch.add(gx, gx)},
        "pairwise, forward + backward": {n: with_backward(f) for n, f in functions.items()}
        | {
            "torch.cdist": with_backward(torch.cdist),
            "torch.mul": lambda: torch.autograd.grad(torch.mul(gx, gx), gx, x),
        },
        "pairwise_backward op alone": {
            "torch.ops, .default": lambda: ops.pairwise_backward.default(
                grad, x, y, None, None, out, "sqeuclidean"
            )
        },
    }


def classify_calls(
    support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor, way: int
) -> dict[str, Calls]:
    gs, gq = support.clone().requires_grad_(), query.clone().requires_grad_()
    options = (query_labels, None, way, "prototypical", "sqeuclidean", 1.0, 1)

    entries: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pybind typed entry": lambda s, q: _C.classify(s, labels, q, *options),
        "torch.ops, .default": lambda s, q: ops.classify.default(s, labels, q, *options)[0],
        "torch.ops, packet": lambda s, q: ops.classify(s, labels, q, *options)[0],
        "metafast.prototypical_loss": lambda s, q: metafast.prototypical_loss(
            s, labels, q, query_labels, way
        ),
    }
    return {
        "prototypical loss, no gradient": {n: lambda f=f: f(support, query) for n, f in entries.items()},
        "prototypical loss, requires_grad": {n: lambda f=f: f(gs, gq) for n, f in entries.items()},
        "prototypical loss, forward + backward": {
            n: lambda f=f: torch.autograd.grad(f(gs, gq), (gs, gq)) for n, f in entries.items()
        },
        "prototypes": {
            "pybind typed entry": lambda: _C.prototypes(support, labels, way),
            "torch.ops, .default": lambda: ops.prototypes.default(support, labels, way),
            "torch.ops, packet": lambda: ops.prototypes(support, labels, way),
            "metafast.prototypes": lambda: metafast.prototypes(support, labels, way),
        },
    }


def inner_loop_calls(x: Tensor, y: Tensor) -> dict[str, Calls]:
    """One step of one task, two layers: x [S, D], y [Q, D] as targets and queries alike."""
    widths = (x.shape[1], x.shape[1], 1)
    params = [
        torch.randn(*shape, device=x.device) / o**0.5
        for i, o in itertools.pairwise(widths)
        for shape in ((o, i), (o,))
    ]
    leaves = [p.clone().requires_grad_() for p in params]
    support, query = ((t.unsqueeze(0), t.mean(1, keepdim=True).unsqueeze(0)) for t in (x, y))
    keywords = {"loss": "mse", "lr": 0.01, "steps": 1}
    lr, options = torch.full((), 0.01, device=x.device), ("mse", 1, "relu", 0.0, False)

    adapt: dict[str, Callable[[list[Tensor]], object]] = {
        "pybind typed entry": lambda params: _C.inner_sgd(params, *support, [lr], *options),
        "torch.ops, .default": lambda params: ops.inner_sgd.default(params, *support, [lr], *options),
        "metafast.inner_sgd": lambda params: metafast.inner_sgd(params, *support, **keywords),
    }
    losses: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "pybind typed entry": lambda params: _C.maml_loss(
            params, *support, *query, [lr], None, *options, True
        ),
        "torch.ops, .default": lambda params: ops.maml_loss.default(
            params, *support, *query, [lr], None, *options, True
        ),
        "metafast.maml_loss": lambda params: metafast.maml_loss(params, *support, *query, **keywords),
    }
    return {
        "inner_sgd, no gradient": {n: lambda f=f: f(params) for n, f in adapt.items()},
        "inner_sgd, requires_grad": {n: lambda f=f: f(leaves) for n, f in adapt.items()},
        "maml_loss, no gradient": {n: lambda f=f: f(params) for n, f in losses.items()},
        "maml_loss, requires_grad": {n: lambda f=f: f(leaves) for n, f in losses.items()},
        "maml_loss, forward + backward": {
            n: lambda f=f: torch.autograd.grad(f(leaves), leaves) for n, f in losses.items()
        },
    }


def groups(device: torch.device, way: int, queries: int, features: int) -> dict[str, Calls]:
    support, query = torch.randn(way, features, device=device), torch.randn(queries, features, device=device)
    labels = torch.arange(way, device=device)
    query_labels = torch.arange(queries, device=device) % way
    return (
        pairwise_calls(query, support)
        | classify_calls(support, labels, query, query_labels, way)
        | inner_loop_calls(support, query)
    )


# --- beside busy processes ----------------------------------------------------------------------------------

BUSY = "both cores busy"


def meta_steps(tasks: int) -> Calls:
    problem = SINE(tasks).problem(torch.device("cpu"))

    def on_threads(threads: int, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(threads)
            return call()

        return run

    calls: dict[str, Callable[[], object]] = {
        f"{name}, {threads} thread{'s'[: threads - 1]}": on_threads(threads, call)
        for name, call in (
            ("metafast", metafast_call(problem)),
            ("torch, bmm by hand", by_hand.bmm_by_hand(problem)),
        )
        for threads in (1, 2)
    }
    with contextlib.suppress(Skip):
        calls["JAX, both cores"] = in_jax.vmap(problem)
    return calls


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """They keep to the cores of this one."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_busy(clock: Clock, plan: Plan, report: Report) -> None:
    plan = dataclasses.replace(plan, sample_s=10 * plan.sample_s)  # some turns on a core
    for tasks in (25, 256):
        calls = meta_steps(tasks)
        alone = measure(calls, clock, plan)
        with busy_processes(3):
            busy = measure(calls, clock, plan)
        report.say(f"\n{BUSY}: MAML on {tasks} sine waves\n  {'us per call':<30} {'alone':>10} {'busy':>10}")
        for name in calls:
            report.say(f"  {name:<30} {alone[name].median:10.1f} {busy[name].median:10.1f}")
            costs = {"alone_us": alone[name]._asdict(), "busy_us": busy[name]._asdict()}
            report.add({"group": f"{BUSY}, {tasks} tasks", "name": name, **costs})
    torch.set_num_threads(1)


def measure(calls: Calls, clock: Clock, plan: Plan) -> dict[str, Cost]:
    return {
        name: Cost(statistics.median(samples) * 1e6, min(samples) * 1e6)
        for name, samples in interleave(calls, clock, plan).items()
    }


def conclusions(tiny: dict[str, dict[str, Cost]]) -> list[str]:
    """The choice in the code against its rivals here."""
    lines = []
    for group, costs in tiny.items():
        times = {name: cost.median for name, cost in costs.items()}
        rivals = {name: times[name] for name in RIVALS if name in times}
        choice = next((name for name in CHOSEN if name in times), None)
        if choice is None:
            continue
        best = min((choice, *rivals), key=times.__getitem__)
        verdict = "the cheapest" if best == choice else f"NOT the cheapest, which is {best}"
        others = ", ".join(f"{name} {t - times[choice]:+.2f} us" for name, t in rivals.items())
        lines.append(f"{group}: {choice}, {verdict} ({others})")
    return lines


def main(options: argparse.Namespace) -> None:
    stop_at_sigterm()
    torch.set_num_threads(1)  # nothing here is large enough for two
    clock = Clock(options.device)
    quick, full = Plan(sample_s=0.002, variant_s=0.1), Plan(sample_s=0.005, variant_s=1.0, max_rounds=101)
    tiny_calls = groups(options.device, 2, 2, 4)
    episode_calls = groups(options.device, 5, 75, 64)
    chosen = [group for group in tiny_calls if options.only in group]
    budget, tiny = Budget(options.seconds, [1] * (len(chosen) + 1)), {}
    with Report("overhead", options) as report:
        for group in chosen:
            deadline = budget.share()
            if deadline is None:
                report.say(f"\n{group}: no time left")
                continue
            plan, calls = quick if options.quick else full, tiny_calls[group]
            plan = dataclasses.replace(
                plan, variant_s=min(plan.variant_s, deadline.left() / (2 * len(calls)))
            )
            tiny[group], episode = (measure(c[group], clock, plan) for c in (tiny_calls, episode_calls))
            report.say(f"\n{group}\n  {'us per call':<30} {'2-way D=4':>17} {'5-way D=64':>17}")
            report.say(f"  {'':<30} {'median':>10} {'best':>6} {'median':>10} {'best':>6}")
            for name, cost in tiny[group].items():
                columns = "".join(f" {c.median:10.2f} {c.best:6.2f}" for c in (cost, episode[name]))
                report.say(f"  {name:<30}{columns}")
                costs = {"tiny_us": cost._asdict(), "episode_us": episode[name]._asdict()}
                report.add({"group": group, "name": name, **costs})
        if options.device.type == "cpu" and options.only in BUSY and (deadline := budget.share()):
            plan = dataclasses.replace(
                quick if options.quick else full, variant_s=min(1, deadline.left() / 20)
            )
            measure_busy(clock, plan, report)
        report.content["choices"] = conclusions(tiny)
        report.say("\nthe code's choice, on the tiny call:")
        report.say("\n".join(f"  {line}" for line in report.content["choices"]))
        report.say(f"\nbudget of a call over its kernel: {BUDGET_US:g} us")
        for group, costs in tiny.items():
            for name in (n for n in costs if n.startswith("metafast.") and "backward" not in group):
                word = "met   " if costs[name].median <= BUDGET_US else "MISSED"
                report.say(f"  {word} {group}, {name}: {costs[name].median:.2f} us")


if __name__ == "__main__":
    main(parse("overhead", __doc__))
