"""Learned optimizers against what people use today: a step, and the unroll that trains them.

A step moves P coordinates by two LSTM layers of 20 units (or by the meta-LSTM over one), without autograd. In
the unroll all variants get the gradients that were recorded, so that none of them differentiates through the
network that is trained, and return theta after every step and the gradient of the LSTM's weights. All return
the same numbers, to 1e-4 of the float64 reference.

Floors are the matrix products at the measured sgemm peak plus one exponential for each sigmoid and tanh, at
the speed of torch.exp on an array in the cache; or the bytes over the bandwidth of main memory, where that is
longer. An unroll's floor does each product once forward and twice backward.

Beside the times: the unroll's peak memory, each in a fresh process. `--only memory` selects it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench import _learned_optimizer_by_hand as by_hand
from bench import _learned_optimizer_jax as in_jax
from bench import _learned_optimizer_memory as growth
from bench import _learned_optimizer_peers as peers
from bench._harness import (
    Case,
    Clock,
    Plan,
    Report,
    Target,
    Variant,
    judge,
    measure_peak,
    parse,
    print_case,
    run_case,
)
from bench._learned_optimizer_workloads import (
    BFLOAT16,
    Call,
    Problem,
    Workload,
    expected,
    metafast_step,
    metafast_step_in_place,
    metafast_unroll,
)

# "transposed" is by hand with coordinates last, in place or compiled: what few write, and the fastest
USUAL = ("LSTMCell", "eager", "compiled", "jax")
ALL = (*USUAL, "transposed")
LSTM_CELL = Target(10, ("LSTMCell",), "nn.LSTMCell")
STEP = (
    Target(5, USUAL, "the best with coordinates first, and JAX"),
    Target(5, ALL, "the best of all"),
    LSTM_CELL,
)
UNROLL = (Target(2.5), Target(3, ALL, "the best of all"))
LSTM, META = "LSTM optimizer", "meta-LSTM"
STEP_CHUNK, UNROLL_CHUNK = 16384, 4096  # coordinates: about the best of the powers of two


def step_variants(problem: Problem) -> Iterator[tuple[str, str, Callable[[Problem], Call]]]:
    """name, kind, build"""
    step, in_place = functools.partial(functools.partial, peers.step), by_hand.step_in_place
    yield "metafast, in place", "metafast", metafast_step_in_place
    yield "metafast, functional", "metafast, functional", metafast_step
    if not problem.is_meta:
        half = functools.partial(metafast_step_in_place, state_dtype=torch.bfloat16)
        yield f"metafast, in place, {BFLOAT16}", "metafast, bfloat16", half
    yield "nn.LSTMCell", "LSTMCell", step(peers.Cells)
    yield "nn.LSTMCell, compiled", "compiled", step(peers.Cells, compiled=True)
    yield "nn.LSTM", "eager", step(peers.Lstm)
    yield "nn.LSTM, compiled", "compiled", step(peers.Lstm, compiled=True)
    yield "addmm, in place", "eager", functools.partial(in_place, coordinates_first=True)
    yield "addmm, compiled", "compiled", step(peers.Products, compiled=True)
    yield "transposed addmm, in place", "transposed", in_place
    yield "transposed addmm, compiled", "transposed", step(peers.Transposed, compiled=True)
    if problem.params.numel() > STEP_CHUNK:
        chunked = functools.partial(in_place, chunk=STEP_CHUNK)
        yield "addmm, in place, chunked", "eager", functools.partial(chunked, coordinates_first=True)
        yield "transposed addmm, in place, chunked", "transposed", chunked
    yield "JAX jit", "jax", in_jax.step
    if problem.params.is_cuda:
        yield "addmm, CUDA graph", "graphed", functools.partial(peers.step_graphed, peers.Products)
    if not problem.is_meta:
        yield "PyLO", "library", peers.pylo_step


def unroll_variants(problem: Problem) -> Iterator[tuple[str, str, Callable[[Problem], Call]]]:
    unroll, hand = functools.partial(functools.partial, peers.unroll), by_hand.unroll
    yield "metafast", "metafast", metafast_unroll
    for name, model, kind in (
        ("nn.LSTMCell", peers.Cells, "LSTMCell"),
        ("nn.LSTM", peers.Lstm, "eager"),
        ("addmm", peers.Products, "eager"),
        ("transposed addmm", peers.Transposed, "transposed"),
    ):
        yield f"{name}, autograd", kind, unroll(model)
        compiled = peers.lstm_unroll_compiled if model is peers.Lstm else unroll(model, compiled=True)
        yield f"{name}, autograd, compiled", kind if kind == "transposed" else "compiled", compiled
    for name, chunk in (("", None), (", chunked", UNROLL_CHUNK)):
        if chunk is None or problem.params.numel() > chunk:
            call = functools.partial(hand, chunk=chunk)
            yield f"transposed, backward by hand{name}", "transposed", call
            compiled = functools.partial(call, compiled=True)
            yield f"transposed, backward by hand{name}, compiled", "transposed", compiled
    yield "JAX jit(vjp(scan))", "jax", in_jax.unroll


def build_case(workload: Workload, device: torch.device, targets: Sequence[Target]) -> Case:
    problem, is_unroll = workload.problem(device), workload.steps is not None

    def collect(read: object) -> Sequence[Tensor]:
        return read()

    @functools.cache
    def right(metric: str | None) -> Sequence[Tensor]:
        return expected(problem, is_unroll, torch.bfloat16 if metric == BFLOAT16 else None)

    make = unroll_variants if is_unroll else step_variants
    return Case(
        str(workload),
        [
            Variant(
                name,
                kind,
                functools.partial(build, problem),
                collect,
                metric=BFLOAT16 if kind == "metafast, bfloat16" else None,
            )
            for name, kind, build in make(problem)
        ],
        workload.flops(),
        workload.traffic(),
        right,
        targets,
        tolerance=1e-4,
        other_flops={"backward that runs the steps again": workload.recomputing_flops()} if is_unroll else {},
        exponentials=workload.exponentials(),
    )


def workloads(device: torch.device, quick: bool) -> list[tuple[Workload, Sequence[Target]]]:
    if device.type == "cuda":
        rows = [
            (Workload(LSTM, 10**5), ()),
            (Workload(LSTM, 10**7), (Target(milliseconds=3.3),)),
            (Workload(LSTM, 10**5, 20), (Target(2),)),
            (Workload(META, 10**5), ()),
            (Workload(META, 10**5, 5), (Target(2),)),
        ]
    else:
        rows = [
            (Workload(LSTM, 10**3), STEP),
            *((Workload(LSTM, size), (Target(2), *STEP)) for size in (10**4, 10**5, 10**6)),
            (Workload(META, 10**5), (Target(2), *STEP)),
            (Workload(LSTM, 10**4, 20), UNROLL),
            (Workload(META, 10**4, 5), UNROLL),
        ]
    if not quick:
        return rows
    small = [(dataclasses.replace(w, coordinates=1000, steps=w.steps and 3), t) for w, t in rows]
    return list({w: (w, t) for w, t in small}.values())


def main(options: argparse.Namespace) -> None:
    clock = Clock(options.device)
    # No call takes seconds but the first of those that compile, which is no measurement.
    plan = dataclasses.replace(
        Plan(variant_s=0.1, max_rounds=5) if options.quick else Plan(variant_s=0.6), once_s=math.inf
    )
    report = Report("learned_optimizer", options)
    peak = measure_peak(clock, options.quick)
    print(
        f"sgemm peak {peak.flops / 1e9:.0f} GFLOP/s, {peak.exponentials / 1e9:.1f} G exponentials/s, "
        f"bandwidth {peak.bandwidth / 1e9:.1f} GB/s"
    )
    missed, rows_of = [], workloads(options.device, options.quick)
    for workload, targets in rows_of:
        if options.only not in str(workload):
            continue
        case = build_case(workload, options.device, targets)
        torch._dynamo.reset()  # every case compiles for its own shapes
        rows = run_case(case, clock, plan, peak, options.memory * 2**30)
        verdicts = judge(case, rows)
        print_case(case, rows, verdicts, peak)
        missed += [f"{case.name}: {v['target']}: {v['reached']}" for v in verdicts if not v["met"]]
        report.results.append(
            {
                "case": case.name,
                "floor_ms": peak.floor(case) * 1e3,
                "floor_parts_ms": {part: s * 1e3 for part, s in peak.parts(case).items()},
                "flops": case.flops,
                "other_flops": case.other_flops,
                "exponentials": case.exponentials,
                "traffic_bytes": case.traffic,
                "variants": [dataclasses.asdict(row) for row in rows],
                "targets": verdicts,
            }
        )
    more: dict[str, object] = {}
    if options.only in "memory":
        more["memory"] = growth.memory(options, [w for w, _ in rows_of if w.steps is not None])
        verdicts = [(row["workload"], row["target"]) for row in more["memory"]]
        missed += [f"{name}: {v['target']}: {v['reached']}" for name, v in verdicts if not v["met"]]
    print("\nmissed targets:" if missed else "\nno target missed")
    for line in missed:
        print(f"  {line}")
    report.write(
        sgemm_flops=peak.flops,
        exponentials=peak.exponentials,
        bandwidth_bytes=peak.bandwidth,
        **more,
    )


if __name__ == "__main__":
    main(parse("learned_optimizer", __doc__))
