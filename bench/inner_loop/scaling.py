"""The time per task from 32 to 65,536 tasks, and metafast's memory; with a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from bench.common.cases import Skip
from bench.common.clock import interleave
from bench.common.memory import MIB, peak_bytes
from bench.common.run import Run
from bench.inner_loop.memory import MEMORY
from bench.inner_loop.workloads import SINE

TASKS = [32, 128, 512, 2048, 8192, 32768, 65536]
PEER_TASKS = 2048  # at most so many for the others


def scaling(run: Run) -> list[dict[str, object]]:
    """Microseconds per task, and peak memory of metafast; a figure beside the JSON file."""
    options, say = run.options, run.report.say
    rows: list[dict[str, object]] = []
    say(f"\ntime per task, us, and peak memory of metafast, MiB ({SINE(0).kind}, K=5, second order)")
    names = [name for name in MEMORY.variants if name != "torch.func"]
    say(f"  {'T':>6}" + "".join(f" {name:>18}" for name in (*names, "floor", "memory")))
    for tasks in TASKS[: 2 if options.quick else None]:
        if not run.deadline.left():
            say(f"  {tasks:6} no time left")
            continue
        workload = SINE(tasks)
        problem = workload.problem(options.device)
        calls: dict[str, Callable[[], object]] = {}
        for name in names if tasks <= PEER_TASKS else names[:1]:
            try:
                calls[name] = MEMORY.variants[name](problem)
            except Skip as reason:
                say(f"  {name} skipped: {reason}")
        samples = interleave(calls, run.clock, run.plan)
        times = {name: statistics.median(s) / tasks * 1e6 for name, s in samples.items()}
        floor = max(workload.flops() / run.peak.flops, workload.traffic() / run.peak.bandwidth) / tasks * 1e6
        memory_bytes = peak_bytes(MEMORY.variants["metafast"], workload, SINE(1, steps=1), options)
        cells = [f"{times[name]:.3g}" if name in times else "" for name in names]
        texts = [*cells, f"{floor:.3g}", f"{memory_bytes / MIB:.1f}"]
        say(f"  {tasks:6}" + "".join(f" {text:>18}" for text in texts))
        rows.append({"tasks": tasks, "us_per_task": times, "floor_us": floor, "metafast_bytes": memory_bytes})
    if options.out and rows:
        say(_draw(rows, names, options.out.with_name(f"{options.out.stem}-scaling.svg")))
    return rows


def _draw(rows: list[dict[str, object]], names: list[str], path: Path) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no figure: {error}"
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
    return f"figure written to {path}"
