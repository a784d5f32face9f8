"""What stands beside what: a step, and the unroll that trains the optimizer, with the recorded gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.common.cases import Case, Target, Variant
from bench.learned_optimizer.peers import by_hand, in_jax, libraries, pytorch
from bench.learned_optimizer.workloads import (
    BFLOAT16,
    Call,
    Problem,
    Workload,
    expected,
    metafast_step,
    metafast_step_in_place,
    metafast_unroll,
    metafast_unroll_graphed,
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
    step, in_place = functools.partial(functools.partial, pytorch.step), by_hand.step_in_place
    yield "metafast, in place", "metafast", metafast_step_in_place
    if problem.params.is_cuda:
        graphed = functools.partial(metafast_step_in_place, in_a_graph=True)
        yield "metafast, in place, CUDA graph", "metafast, CUDA graph", graphed
    yield "metafast, functional", "metafast, functional", metafast_step
    if not problem.is_meta:
        half = functools.partial(metafast_step_in_place, state_dtype=torch.bfloat16)
        yield f"metafast, in place, {BFLOAT16}", "metafast, bfloat16", half
    if problem.params.is_cuda:
        yield "addmm, CUDA graph", "graphed", functools.partial(pytorch.step_graphed, pytorch.Products)
    yield "transposed addmm, in place", "transposed", in_place
    yield "nn.LSTMCell", "LSTMCell", step(pytorch.Cells)
    yield "transposed addmm, compiled", "transposed", step(pytorch.Transposed, compiled=True)
    yield "JAX jit", "jax", in_jax.step
    yield "addmm, in place", "eager", functools.partial(in_place, coordinates_first=True)
    if problem.params.numel() > STEP_CHUNK and not problem.params.is_cuda:  # what a cache holds
        chunked = functools.partial(in_place, chunk=STEP_CHUNK)
        yield "transposed addmm, in place, chunked", "transposed", chunked
        yield "addmm, in place, chunked", "eager", functools.partial(chunked, coordinates_first=True)
    yield "addmm, compiled", "compiled", step(pytorch.Products, compiled=True)
    yield "nn.LSTM", "eager", step(pytorch.Lstm)
    yield "nn.LSTMCell, compiled", "compiled", step(pytorch.Cells, compiled=True)
    yield "nn.LSTM, compiled", "compiled", step(pytorch.Lstm, compiled=True)
    if not problem.is_meta:
        yield "PyLO", "library", libraries.pylo_step


def unroll_variants(problem: Problem) -> Iterator[tuple[str, str, Callable[[Problem], Call]]]:
    unroll, hand = functools.partial(functools.partial, pytorch.unroll), by_hand.unroll
    yield "metafast", "metafast", metafast_unroll
    if problem.params.is_cuda:
        yield "metafast, CUDA graph", "metafast, CUDA graph", metafast_unroll_graphed
    on_gpu = problem.params.is_cuda
    yield "JAX jit(vjp(scan))", "jax", in_jax.unroll
    models = (
        ("transposed addmm", pytorch.Transposed, "transposed"),
        ("nn.LSTMCell", pytorch.Cells, "LSTMCell"),
        ("addmm", pytorch.Products, "eager"),
        ("nn.LSTM", pytorch.Lstm, "eager"),
    )
    for name, model, kind in models:
        yield f"{name}, autograd", kind, unroll(model)
    chunks = {"": None}
    if problem.params.numel() > UNROLL_CHUNK and not on_gpu:  # what a cache holds
        chunks[", chunked"] = UNROLL_CHUNK
    for name, chunk in chunks.items():
        call = functools.partial(hand, chunk=chunk)
        yield f"transposed, backward by hand{name}", "transposed", call
        yield (
            f"transposed, backward by hand{name}, compiled",
            "transposed",
            functools.partial(call, compiled=True),
        )
    for name, model, kind in models:
        compiled = pytorch.lstm_unroll_compiled if model is pytorch.Lstm else unroll(model, compiled=True)
        yield f"{name}, autograd, compiled", kind if kind == "transposed" else "compiled", compiled


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
        other_flops={"backward that runs the steps again": workload.recomputing_flops()} if is_unroll else {},
        exponentials=workload.exponentials(),
    )


def workloads(device: torch.device, quick: bool) -> dict[Workload, Sequence[Target]]:
    if device.type == "cuda":
        rows = {
            Workload(LSTM, 10**5): (),
            Workload(LSTM, 10**5, 20): (Target(2),),
            Workload(META, 10**5): (),
            Workload(META, 10**5, 5): (Target(2),),
            Workload(LSTM, 10**7): (Target(milliseconds=3.3),),
            Workload(LSTM, 10**6, 20): (Target(2),),
        }
    else:
        rows = {
            Workload(LSTM, 10**3): STEP,
            **{Workload(LSTM, size): (Target(2), *STEP) for size in (10**4, 10**5, 10**6)},
            Workload(META, 10**5): (Target(2), *STEP),
            Workload(LSTM, 10**4, 20): UNROLL,
            Workload(META, 10**4, 5): UNROLL,
        }
    if not quick:
        return rows
    return {dataclasses.replace(w, coordinates=1000, steps=w.steps and 3): t for w, t in rows.items()}


def cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    for workload, targets in workloads(device, quick).items():
        yield str(workload), functools.partial(build_case, workload, device, targets)
