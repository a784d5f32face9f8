"""The inner loop against what people use today: adaptation, query loss and the gradient of shared parameters.

One call is a meta-step: every task's network takes K steps of SGD on its support examples, and the mean query
loss goes back to the parameters that all tasks start from. All variants return the same loss and the same
meta-gradient, to 1e-4. metafast's is `maml_value_and_grad`, as JAX's is `value_and_grad`; "through autograd"
it is `maml_loss` and `torch.autograd.grad`.

Floors count the multiplications and additions of matrix products alone, twice the one or the other. Second
order counts forward-over-reverse Hessian-vector products that reuse the forward pass's activations.

Beside the times: how peak memory grows with steps and tasks, each measured in a fresh process, and the time
per task from 32 to 65,536 tasks, with a figure. `--only memory` and `--only scaling` select these.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench import _inner_loop_growth as growth
from bench import _inner_loop_peers as peers
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
from bench._inner_loop_workloads import (
    LEARNING_RATE,
    MLP_784,
    SINE,
    Problem,
    Workload,
    metafast_call,
    metafast_through_autograd,
)
from metafast import reference

COMPILED = Target(3, ("compiled",), "the best compiled opponent")
JAX_AND_EAGER = Target(6, ("jax", "eager"), "JAX and eager PyTorch")
LEARN2LEARN = Target(400, ("learn2learn",), "learn2learn")
FEW_TASKS = Target(3, ("jax",), "JAX")
LARGE = Target(2.5, ("eager", "compiled", "jax", "library", "learn2learn"), "the best of all")
MANY_TASKS = (Target(2), COMPILED, JAX_AND_EAGER, LEARN2LEARN)


def expected(problem: Problem) -> list[Tensor]:
    """The float64 reference, in parts that stay small."""
    size = sum(p.numel() for p in problem.params)
    part = max(1, 2**22 // size)
    leaves = [p.double().requires_grad_() for p in problem.params]
    total = [torch.zeros_like(p) for p in (leaves[0].new_zeros(()), *leaves)]
    for chunk in zip(*(t.split(part) for t in problem.data), strict=True):
        data = [t.double() if t.is_floating_point() else t for t in chunk]
        loss = reference.maml_loss(
            leaves,
            *data,
            loss=problem.loss,
            lr=LEARNING_RATE,
            steps=problem.steps,
            first_order=problem.first_order,
            reduction="none",
        ).sum()
        found = (loss.detach(), *torch.autograd.grad(loss, leaves))
        total = [t + f for t, f in zip(total, found, strict=True)]
    return [t / problem.tasks for t in total]


def build_case(workload: Workload, device: torch.device, targets: Sequence[Target]) -> Case:
    problem = workload.problem(device)

    def variant(name: str, kind: str, build: Callable[[Problem], Callable[[], object]]) -> Variant:
        collect = peers.from_jax if kind == "jax" else list
        return Variant(name, kind, lambda: build(problem), collect)

    batched = [
        variant("metafast", "metafast", metafast_call),
        variant("metafast, through autograd", "metafast, through autograd", metafast_through_autograd),
        variant("bmm, autograd", "eager", peers.bmm_autograd),
        variant("bmm, HVP by hand", "eager", peers.bmm_by_hand),
        variant("JAX jit(grad(vmap))", "jax", peers.jax_vmap),
    ]
    on_gpu = [variant("bmm, HVP by hand, CUDA graph", "graphed", peers.bmm_by_hand_graphed)]
    on_cpu = [
        variant(
            "bmm, HVP by hand, compiled", "compiled", functools.partial(peers.bmm_by_hand, compiled=True)
        ),
        variant("torch.func", "eager", peers.torch_func),
        variant("torch.func, compiled", "compiled", functools.partial(peers.torch_func, compiled=True)),
        variant("plain loop", "library", peers.plain_loop),
        variant("learn2learn", "learn2learn", peers.learn2learn_loop),
        variant("higher", "library", peers.higher_loop),
        variant("TorchOpt", "library", peers.torchopt_loop),
    ]
    variants = batched + (on_gpu if device.type == "cuda" else on_cpu)
    right = functools.cache(lambda _: expected(problem))
    return Case(
        str(workload),
        variants,
        workload.flops(),
        workload.traffic(),
        right,
        targets,
        tolerance=1e-4,
        other_flops={"dual form": workload.dual_flops()} if workload.dual_pays() else {},
    )


def cases(device: torch.device, quick: bool, only: str) -> Iterator[Callable[[], Case]]:
    """Built one after the other, so that one case's data is gone before the next one's comes."""
    if device.type == "cuda":
        rows = [
            (SINE(25), (Target(milliseconds=0.1),)),
            (SINE(4096), (Target(milliseconds=0.5),)),
            (MLP_784(1024), (Target(milliseconds=3),)),
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
        if only in str(workload):
            yield functools.partial(build_case, workload, device, targets)


def main(options: argparse.Namespace) -> None:
    clock = Clock(options.device)
    plan = Plan(variant_s=0.1, max_rounds=5) if options.quick else Plan(variant_s=0.7, once_s=0.5)
    report = Report("inner_loop", options)
    peak = measure_peak(clock, options.quick)
    print(f"sgemm peak {peak.flops / 1e9:.0f} GFLOP/s, bandwidth {peak.bandwidth / 1e9:.1f} GB/s")
    missed = []
    for build in cases(options.device, options.quick, options.only):
        case = build()
        torch._dynamo.reset()  # every case compiles for its own shapes
        rows = run_case(case, clock, plan, peak, options.memory * 2**30)
        verdicts = judge(case, rows)
        print_case(case, rows, verdicts, peak)
        missed += [f"{case.name}: {v['target']}: {v['reached']}" for v in verdicts if not v["met"]]
        report.results.append(
            {
                "case": case.name,
                "floor_ms": peak.floor(case) * 1e3,
                "flops": case.flops,
                "other_flops": case.other_flops,
                "traffic_bytes": case.traffic,
                "variants": [dataclasses.asdict(row) for row in rows],
                "targets": verdicts,
            }
        )
    more: dict[str, object] = {}
    if options.only in "memory":
        more["memory"] = growth.memory(options)
    if options.only in "scaling":
        more["scaling"] = growth.scaling(options, clock, plan, peak)
    print("\nmissed targets:" if missed else "\nno target missed")
    for line in missed:
        print(f"  {line}")
    report.write(sgemm_flops=peak.flops, bandwidth_bytes=peak.bandwidth, **more)


if __name__ == "__main__":
    main(parse("inner_loop", __doc__))
