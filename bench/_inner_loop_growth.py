"""How memory and time of the inner loop grow with steps and tasks.

    python -m bench._inner_loop_growth VARIANT TASKS STEPS THREADS

prints the bytes that one call takes at its peak, beyond its arguments, in this process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import _inner_loop_peers as peers
from bench._harness import Clock, Peak, Plan, Skip, interleave
from bench._inner_loop_workloads import SINE, Problem, Workload, metafast_through_autograd
from bench._memory import MIB, peak_of_process, peak_on_cuda, print_peak
from metafast import _C

VARIANTS: dict[str, Callable[[Problem], Callable[[], object]]] = {
    "metafast": metafast_through_autograd,
    "bmm, HVP by hand": peers.bmm_by_hand,
    "torch.func": peers.torch_func,
    "JAX": peers.jax_vmap,
}
MEMORY_SIZES = [(256, 1), (256, 5), (256, 20), (32, 5), (2048, 5)]  # tasks, steps
SCALING_TASKS = [32, 128, 512, 2048, 8192, 32768, 65536]
PEER_TASKS = 2048  # at most so many for the others
# Tasks in the lanes, on AVX-512 half as many: two examples of each.
GROUP = {"baseline": 4, "avx2": 8, "avx512": 8}


def documented_bytes(workload: Workload, threads: int) -> int:
    """As csrc/inner_loop/adaptation.h states it, for second order on the CPU, where tasks fill the lanes.

    Each thread holds K + 4 sets of a group's parameters; each work item of 8 tasks and more, 64 at most,
    leaves a sum of the gradient. Activations of a step, small beside these, are not in it.
    """
    group = GROUP[_C.active_isa()]
    of_threads = min(threads, -(-workload.tasks // group)) * (workload.steps + 4) * group
    items = min(64, -(-workload.tasks // 8))
    return 4 * (of_threads + items) * workload.parameters


# --- peak memory ------------------------------------------------------------------------------------------


def peak_bytes(variant: str, workload: Workload, device: torch.device, threads: int) -> int:
    """What one call takes at its peak beyond its arguments."""
    if device.type == "cuda":
        return peak_on_cuda(VARIANTS[variant](workload.problem(device)))
    return peak_of_process("bench._inner_loop_growth", variant, workload.tasks, workload.steps, threads)


def _variants(device: torch.device) -> list[str]:
    """JAX has an allocator of its own on CUDA."""
    return [name for name in VARIANTS if device.type == "cpu" or name != "JAX"]


def memory(options: argparse.Namespace) -> list[dict[str, object]]:
    names = _variants(options.device)
    sizes = MEMORY_SIZES[3:4] if options.quick else MEMORY_SIZES
    print(f"\npeak memory of a call beyond its arguments, MiB ({SINE(0).kind}, second order)")
    columns = [*names, "documented"] if options.device.type == "cpu" else names
    print(f"  {'T':>6} {'K':>3}" + "".join(f" {name:>18}" for name in columns))
    rows = []
    for tasks, steps in sizes:
        workload = SINE(tasks, steps=steps)
        row: dict[str, object] = {"tasks": tasks, "steps": steps}
        for name in names:
            try:
                row[name] = peak_bytes(name, workload, options.device, options.threads)
            except Skip as reason:
                row[name] = str(reason)
        if "documented" in columns:
            row["documented"] = documented_bytes(workload, options.threads)
        texts = [f"{b / MIB:.1f}" if isinstance(b := row[name], int) else "skipped" for name in columns]
        print(f"  {tasks:6} {steps:3}" + "".join(f" {text:>18}" for text in texts), flush=True)
        rows.append(row)
    return rows


# --- time per task ----------------------------------------------------------------------------------------


def scaling(options: argparse.Namespace, clock: Clock, plan: Plan, peak: Peak) -> list[dict[str, object]]:
    """Microseconds per task, and peak memory of metafast; a figure beside the JSON file."""
    device = options.device
    rows: list[dict[str, object]] = []
    print(f"\ntime per task, us, and peak memory of metafast, MiB ({SINE(0).kind}, K=5, second order)")
    names = [name for name in VARIANTS if name != "torch.func"]
    print(f"  {'T':>6}" + "".join(f" {name:>18}" for name in (*names, "floor", "memory")))
    for tasks in SCALING_TASKS[: 2 if options.quick else None]:
        workload = SINE(tasks)
        problem = workload.problem(device)
        calls: dict[str, Callable[[], object]] = {}
        for name in names if tasks <= PEER_TASKS else names[:1]:
            try:
                calls[name] = VARIANTS[name](problem)
            except Skip as reason:
                print(f"  {name} skipped: {reason}")
        samples = interleave(calls, clock, plan)
        times = {name: statistics.median(s) / tasks * 1e6 for name, s in samples.items()}
        floor = max(workload.flops() / peak.flops, workload.traffic() / peak.bandwidth) / tasks * 1e6
        memory_bytes = peak_bytes("metafast", workload, device, options.threads)
        cells = [f"{times[name]:.3g}" if name in times else "" for name in names]
        texts = [*cells, f"{floor:.3g}", f"{memory_bytes / MIB:.1f}"]
        print(f"  {tasks:6}" + "".join(f" {text:>18}" for text in texts), flush=True)
        rows.append({"tasks": tasks, "us_per_task": times, "floor_us": floor, "metafast_bytes": memory_bytes})
    if options.out:
        _draw(rows, names, options.out.with_name(f"{options.out.stem}-scaling.svg"))
    return rows


def _draw(rows: list[dict[str, object]], names: list[str], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no figure: {error}")
        return
    import matplotlib

    # These are told apart by the colour-blind.
    colours = dict(zip(names, ("#0072b2", "#d55e00", "#009e73"), strict=True))
    figure = Figure(figsize=(7, 5), layout="constrained")
    time, space = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name in names:
        points = [(row["tasks"], row["us_per_task"][name]) for row in rows if name in row["us_per_task"]]
        if points:
            time.plot(*zip(*points, strict=True), "o-", label=name, color=colours[name])
    tasks = [row["tasks"] for row in rows]
    time.plot(tasks, [row["floor_us"] for row in rows], "--", color="#7f7f7f", label="floor")
    time.set(yscale="log", ylabel="µs per task", title="1-40-40-1, K=5, second order: one meta-step")
    time.legend(frameon=False)
    space.plot(tasks, [row["metafast_bytes"] / MIB for row in rows], "o-", color=colours["metafast"])
    space.set(xscale="log", xlabel="tasks in one call", ylabel="metafast's\npeak memory, MiB")
    space.set_ylim(0, 1.2 * max(row["metafast_bytes"] for row in rows) / MIB)
    space.set_xticks(tasks, [f"{t:,}" for t in tasks])
    space.minorticks_off()
    for axes in (time, space):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "metafast", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    print(f"figure written to {path}")


def main(arguments: list[str]) -> None:
    variant = arguments[0]
    tasks, steps, threads = map(int, arguments[1:])

    def build() -> Callable[[], object]:
        make = VARIANTS[variant]
        make(SINE(1, steps=1).problem(torch.device("cpu")))()
        call = make(SINE(tasks, steps=steps).problem(torch.device("cpu")))
        if variant == "JAX":
            call()  # compiles
        return call

    print_peak(threads, build)


if __name__ == "__main__":
    main(sys.argv[1:])
