"""Times calls against each other, interleaved."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds per call of `repeats` calls in a row, until all that they started is done."""

    device: torch.device

    def __call__(self, call: Callable[[], object], repeats: int = 1) -> float:
        wait = getattr(call, "wait", None)  # of a call that returns before its result is there: JaxCall
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            if wait:
                wait()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
        start_ns = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        if wait:
            wait()
        return (time.perf_counter_ns() - start_ns) / 1e9 / repeats


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    sample_s: float = 0.01  # a sample repeats a short call until it takes this long
    variant_s: float = 1.5  # the time spent on one variant, after which the others go on without it
    min_rounds: int = 3
    max_rounds: int = 51
    once_s: float = 5.0  # what took so long while its result was checked is timed by that call alone


def interleave(calls: dict[str, Callable[[], object]], clock: Clock, plan: Plan) -> dict[str, list[float]]:
    """The samples of each call, in seconds: A B C A B C ..., so that a disturbance hits all alike."""
    repeats = {}
    for name, call in calls.items():
        once = clock(call)
        if once < 0.1:
            once = min(once, clock(call))
        repeats[name] = max(1, math.ceil(plan.sample_s / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(plan.max_rounds):
            due = [n for n in calls if round_ < plan.min_rounds or spent[n] < plan.variant_s]
            for name in due:
                began = time.perf_counter()
                if not samples[name] or samples[name][-1] < 0.1:
                    calls[name]()  # brings its data and threads back after the neighbour's call
                samples[name].append(clock(calls[name], repeats[name]))
                spent[name] += time.perf_counter() - began
    finally:
        gc.enable()
    return samples
