"""What stands beside what. One call is a meta-step: all variants return the same loss and the same
meta-gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.common.cases import Case, Target, Variant
from bench.common.in_jax import to_torch
from bench.inner_loop.peers import by_hand, in_jax, libraries, pytorch
from bench.inner_loop.workloads import (
    MLP_784,
    SINE,
    Problem,
    Workload,
    expected,
    metafast_call,
    metafast_graphed,
    metafast_through_autograd,
)

COMPILED = Target(3, ("compiled",), "the best compiled opponent")
JAX_AND_EAGER = Target(6, ("jax", "eager"), "JAX and eager PyTorch")
LEARN2LEARN = Target(400, ("learn2learn",), "learn2learn")
FEW_TASKS = Target(3, ("jax",), "JAX")
LARGE = Target(2.5, ("eager", "compiled", "jax", "library", "learn2learn"), "the best of all")
COMPILING_S = 30  # five steps and back, by torch.compile
MANY_TASKS = (Target(2), COMPILED, JAX_AND_EAGER, LEARN2LEARN)


def build_case(workload: Workload, device: torch.device, targets: Sequence[Target]) -> Case:
    problem, on_gpu = workload.problem(device), device.type == "cuda"

    def variant(
        name: str, kind: str, build: Callable[[Problem], Callable[[], object]], build_s: float = 0
    ) -> Variant:
        collect = to_torch if kind == "jax" else list
        return Variant(name, kind, lambda: build(problem), collect, build_s=build_s)

    in_a_graph = [
        variant("metafast, CUDA graph", "metafast, CUDA graph", metafast_graphed),
        variant("bmm, HVP by hand, CUDA graph", "graphed", by_hand.bmm_by_hand_graphed),
    ]
    compiled_by_hand = functools.partial(by_hand.bmm_by_hand, compiled=True)
    compiled_func = functools.partial(pytorch.torch_func, compiled=True)
    loops = [  # task by task: on a GPU thousands of launches each
        variant("plain loop", "library", pytorch.plain_loop),
        variant("learn2learn", "learn2learn", libraries.learn2learn_loop),
        variant("higher", "library", libraries.higher_loop),
        variant("TorchOpt", "library", libraries.torchopt_loop),
    ]
    variants = [
        variant("metafast", "metafast", metafast_call),
        variant("metafast, through autograd", "metafast, through autograd", metafast_through_autograd),
        *(in_a_graph if on_gpu else ()),
        variant("JAX jit(grad(vmap))", "jax", in_jax.vmap),
        variant("bmm, HVP by hand", "eager", by_hand.bmm_by_hand),
        variant("bmm, autograd", "eager", pytorch.bmm_autograd),
        variant("bmm, HVP by hand, compiled", "compiled", compiled_by_hand, COMPILING_S),
        variant("torch.func, compiled", "compiled", compiled_func, COMPILING_S),
        variant("torch.func", "eager", pytorch.torch_func),
        *(() if on_gpu else loops),
    ]
    return Case(
        str(workload),
        variants,
        workload.flops(),
        workload.traffic(),
        functools.cache(lambda _: expected(problem)),
        targets,
        other_flops={"dual form": workload.dual_flops()} if workload.dual_pays() else {},
    )


def cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    if device.type == "cuda":
        rows = [
            (SINE(4096), (Target(milliseconds=0.5),)),
            (SINE(25), (Target(milliseconds=0.1),)),
            (MLP_784(1024), (Target(milliseconds=3),)),
            (SINE(4096, first_order=True), ()),
        ]
    else:
        rows = [
            (SINE(1), (FEW_TASKS,)),
            (SINE(4), (FEW_TASKS,)),
            (SINE(32), MANY_TASKS),
            (SINE(256), MANY_TASKS),
            (SINE(2048), MANY_TASKS),
            (SINE(2048, first_order=True), MANY_TASKS),
            (MLP_784(4), (LARGE,)),
            (MLP_784(32), (LARGE,)),
        ]
    if quick:
        rows = [(dataclasses.replace(w, tasks=min(w.tasks, 8), steps=2), targets) for w, targets in rows]
    for workload, targets in dict(rows).items():
        yield str(workload), functools.partial(build_case, workload, device, targets)
