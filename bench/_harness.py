"""Measures competing variants of one computation against each other and against what the machine can do.

Variants are interleaved (A B C A B C ...), so that a disturbance hits all of them alike; medians are
reported, and beside them the best sample, which a busy machine disturbs least. Each variant's result is
compared with the expected one before it is timed. A variant that cannot run stays in the table, with the
reason. The floor is the time of the arithmetic at the measured sgemm peak, with that of the exponentials
where a case has some, or of the unavoidable memory traffic at the measured bandwidth, whichever is longer.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from metafast import _C

GIB = 2**30
TOLERANCE = 1e-3  # float32 sums of thousands of terms, in any order


class Skip(Exception):
    """Raised while a variant is built: it cannot run here, for the reason given."""


@dataclass(frozen=True)
class Variant:
    name: str
    # "metafast"; "metafast, ..." of another way to call it; or what a target can be stated against: "eager",
    # "compiled", "jax", "library" ...
    kind: str
    build: Callable[[], Callable[[], object]]  # returns the call to time
    collect: Callable[[object], Sequence[Tensor]]  # of what the call returns: as `Case.expected`
    metric: str | None = None  # where the variant computes another metric than the case
    peak_bytes: float = 0  # estimate of the memory that the call takes beyond its arguments


@dataclass(frozen=True)
class Target:
    """metafast `ratio` times as fast as the best of `kinds`; without kinds at most `ratio` x floor.

    With `milliseconds`, at most so many instead.
    """

    ratio: float = 1
    kinds: Collection[str] = ()
    what: str = "the best of all"
    milliseconds: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    variants: Sequence[Variant]
    flops: float
    traffic: float  # bytes that have to be read or written at least once
    expected: Callable[[str | None], Sequence[Tensor]]  # metric (None: the case's own) -> the right results
    targets: Sequence[Target] = ()
    tolerance: float = TOLERANCE
    other_flops: Mapping[str, float] = field(default_factory=dict)  # of other algorithms for the same result
    exponentials: float = 0  # which take as long as products of matrices would, and longer


@dataclass
class Row:
    variant: str
    kind: str
    skipped: str | None = None
    milliseconds: float | None = None  # median
    best_milliseconds: float | None = None
    rounds: int = 0
    times_floor: float | None = None
    times_metafast: float | None = None  # how many times as long as metafast


@dataclass(frozen=True)
class Peak:
    flops: float  # float32 matrix products, per second
    bandwidth: float  # bytes per second
    exponentials: float  # float32 torch.exp of what lies in the cache, per second

    def parts(self, case: Case) -> dict[str, float]:
        """Seconds of what bounds a case."""
        return {
            "matrix products": case.flops / self.flops,
            "exponentials": case.exponentials / self.exponentials,
            "memory": case.traffic / self.bandwidth,
        }

    def floor(self, case: Case, flops: float | None = None) -> float:
        arithmetic = (flops or case.flops) / self.flops + case.exponentials / self.exponentials
        return max(arithmetic, case.traffic / self.bandwidth)


# --- the clock --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Seconds per call of `repeats` calls in a row."""

    device: torch.device

    def __call__(self, call: Callable[[], object], repeats: int = 1) -> float:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
        start_ns = time.perf_counter_ns()
        for _ in range(repeats):
            call()
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
    """The samples of each call, in seconds."""
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


def measure_peak(clock: Clock, quick: bool) -> Peak:
    size = 1024 if quick else 4096
    a, b = (torch.randn(size, size, device=clock.device) for _ in range(2))
    product = min(clock(lambda: a @ b) for _ in range(5))
    # 1 GiB, larger than the cache. Reading and copying differ in speed; the faster makes the lower floor.
    source = torch.ones((GIB >> (3 if quick else 0)) // 4, device=clock.device)
    target = torch.empty_like(source)
    read = min(clock(source.sum) for _ in range(5))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
    cached = torch.randn(2**18, device=clock.device)
    result = torch.empty_like(cached)
    exponential = min(clock(lambda: torch.exp(cached, out=result), 50) for _ in range(5))
    return Peak(
        2 * size**3 / product,
        max(source.nbytes / read, 2 * source.nbytes / copy),
        cached.numel() / exponential,
    )


# --- one case ---------------------------------------------------------------------------------------------


def wrong_by(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the results, in the Euclidean norm.

    Not in the maximum norm: where a relu's argument is almost 0, float32 may fall on the other side.
    """
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if f.shape != e.shape:
            raise ValueError(f"result: expected shape {tuple(e.shape)}, got {tuple(f.shape)}")
        error = ((f.detach().double() - e).norm() / e.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


COMPILING = ("compiled", "jax")  # the first call of these compiles


def run_case(case: Case, clock: Clock, plan: Plan, peak: Peak, memory_limit: float) -> list[Row]:
    rows = {v.name: Row(v.name, v.kind) for v in case.variants}
    calls, timed = {}, {}
    for variant in case.variants:
        if variant.peak_bytes > memory_limit:
            rows[variant.name].skipped = f"would take {variant.peak_bytes / GIB:.0f} GiB"
            continue
        try:
            call = variant.build()
            results: list[object] = []
            first = clock(lambda call=call, results=results: results.append(call()))
            error = wrong_by(variant.collect(results.pop()), case.expected(variant.metric))
        except Skip as reason:
            rows[variant.name].skipped = str(reason)
            continue
        except torch.OutOfMemoryError:
            if variant.kind.startswith("metafast"):
                raise
            rows[variant.name].skipped = "out of memory"
            continue
        if error > case.tolerance and variant.kind.startswith("metafast"):
            raise RuntimeError(f"{case.name}: {variant.name} is wrong by {error:.1e}")
        if error > case.tolerance:
            rows[variant.name].skipped = f"wrong by {error:.1e}, not timed"
            continue
        if first > plan.once_s and variant.kind not in COMPILING:
            timed[variant.name] = [first]
        else:
            calls[variant.name] = call
    floor = peak.floor(case)
    timed |= interleave(calls, clock, plan)
    for name, samples in timed.items():
        seconds = statistics.median(samples)
        rows[name].milliseconds, rows[name].best_milliseconds = seconds * 1e3, min(samples) * 1e3
        rows[name].rounds = len(samples)
        rows[name].times_floor = seconds / floor
    ours = next(r.milliseconds for r in rows.values() if r.kind == "metafast")
    for name in timed:
        rows[name].times_metafast = rows[name].milliseconds / ours
    return sorted(rows.values(), key=lambda row: row.milliseconds or math.inf)


def judge(case: Case, rows: Sequence[Row]) -> list[dict[str, object]]:
    """Each target, what was reached, and whether that is enough. Beside it what other ways to call reach."""
    verdicts: list[dict[str, object]] = []
    ours = next(r for r in rows if r.kind == "metafast")
    for target in case.targets:
        if target.milliseconds is not None:
            goal, best = f"at most {target.milliseconds:g} ms", None
        elif not target.kinds:
            goal, best = f"at most {target.ratio:g} x floor", None
        else:
            rivals = [r for r in rows if r.kind in target.kinds and r.milliseconds is not None]
            if not rivals:
                continue  # the table says why each was skipped
            goal = f"at least {target.ratio:g} times as fast as {target.what}"
            best = min(rivals, key=lambda r: r.milliseconds)
        value, text, met = _reached(target, ours, best)
        others = "".join(
            f"; {row.variant}: {_reached(target, row, best)[1]}"
            for row in rows
            if row.kind.startswith("metafast,") and row.milliseconds is not None
        )
        rival = f" ({best.variant})" if best else ""
        verdicts.append({"target": goal, "reached": text + rival + others, "value": value, "met": met})
    return verdicts


def _reached(target: Target, row: Row, rival: Row | None) -> tuple[float, str, bool]:
    """What a row reaches of a target, in words too, and whether that is enough."""
    if target.milliseconds is not None:
        return row.milliseconds, f"{row.milliseconds:.4g} ms", row.milliseconds <= target.milliseconds
    if rival is None:
        return row.times_floor, f"{row.times_floor:.2f} x floor", row.times_floor <= target.ratio
    ratio = rival.milliseconds / row.milliseconds
    return ratio, f"{ratio:.2f} times", ratio >= target.ratio


def print_case(case: Case, rows: Sequence[Row], verdicts: Sequence[dict[str, object]], peak: Peak) -> None:
    parts, floor = peak.parts(case), peak.floor(case)
    bound = "memory" if floor == parts["memory"] else "arithmetic"
    print(f"\n{case.name}   floor {floor * 1e3:.4g} ms ({bound})")
    if case.exponentials:
        print("  " + ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in parts.items()))
    ours = next(row.milliseconds for row in rows if row.kind == "metafast")
    for algorithm, flops in case.other_flops.items():
        floor = peak.floor(case, flops) * 1e3
        print(f"  floor of the {algorithm}: {floor:.4g} ms, of which metafast takes {ours / floor:.1f} times")
    width = max(len(row.variant) for row in rows)
    print(f"  {'':{width}} {'median ms':>10} {'best ms':>10} {'x floor':>8} {'x metafast':>10}")
    for row in rows:
        if row.skipped:
            print(f"  {row.variant:{width}}    skipped: {row.skipped}")
            continue
        print(
            f"  {row.variant:{width}} {row.milliseconds:10.4g} {row.best_milliseconds:10.4g} "
            f"{row.times_floor:8.1f} {row.times_metafast:10.2f}"
        )
    for verdict in verdicts:
        word = "met   " if verdict["met"] else "MISSED"
        print(f"  {word} {verdict['target']}: {verdict['reached']}", flush=True)


# --- the run ----------------------------------------------------------------------------------------------

PACKAGES = (
    "metafast",
    "torch",
    "jax",
    "easyfsl",
    "pytorch-metric-learning",
    "learn2learn",
    "higher",
    "torchopt",
)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "csrc", "metafast") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an exported tree


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


@dataclass
class Report:
    """What a run writes as JSON beside the table that it prints."""

    name: str
    options: argparse.Namespace
    results: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cuda = self.options.device.type == "cuda"
        self.machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": self.options.threads,
            "isa": _C.active_isa(),
            "gpu": torch.cuda.get_device_name(self.options.device) if cuda else None,
            "python": platform.python_version(),
            "versions": {p: version(p) for p in PACKAGES},
            "quick": self.options.quick,
            "load_average_start": os.getloadavg()[0],
        }
        versions = ", ".join(f"{name} {v}" for name, v in self.machine["versions"].items() if v)
        m = self.machine
        place = m["gpu"] or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
        print(f"{self.name} on {place}\n{versions}, commit {self.machine['commit']}")
        print(f"load average at the start {self.machine['load_average_start']:.2f}", flush=True)

    def write(self, **more: object) -> None:
        self.machine["load_average_end"] = os.getloadavg()[0]
        print(f"\nload average at the end {self.machine['load_average_end']:.2f}")
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"benchmark": self.name, "machine": self.machine, **more, "results": self.results}
            self.options.out.write_text(json.dumps(content, indent=1) + "\n")
            print(f"written to {self.options.out}")


def parse(name: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=2, help="CPU cores that every variant may use")
    parser.add_argument("--quick", action="store_true", help="small and few: to see that it runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--memory", type=float, default=6, metavar="GIB", help="skip what takes more")
    default_out = f"bench/results/{name}-<device>.json"
    parser.add_argument("--out", type=Path, help=f"JSON file; of a full run by default {default_out}")
    options = parser.parse_args()
    if options.out is None and not options.quick and not options.only:
        options.out = Path(__file__).parent / "results" / f"{name}-{options.device.type}.json"
    # The same cores for everyone: torch, metafast and JAX, which has no setting of its own.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options
