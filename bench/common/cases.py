"""One computation, the variants of it, and what comes of measuring them against each other.

Each variant's result is compared with the float64 reference before it is timed. A variant that cannot run
stays in the table, with the reason. The floor is the time of the arithmetic at the measured peak (sgemm's,
and where a family asks for it that of FMAs, which is higher), with that of the exponentials where a case has
some, or of the unavoidable memory traffic at the measured bandwidth, whichever is longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.common.budget import Deadline
from bench.common.clock import Clock, Plan, interleave
from bench.common.machine import GIB, Peak


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
    build_s: float = 0  # estimate of how long it compiles, where that is long

    @property
    def is_ours(self) -> bool:
        return is_ours(self.kind)


def is_ours(kind: str) -> bool:
    return kind.split(",")[0] == "metafast"


@dataclass(frozen=True)
class Target:
    """metafast `ratio` times as fast as the best of `kinds`; without kinds at most `ratio` x floor.

    With `milliseconds` or `gib`, at most so many of time, or of memory at the peak, instead.
    """

    ratio: float = 1
    kinds: Collection[str] = ()
    what: str = "the best of all"
    milliseconds: float | None = None
    gib: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    variants: Sequence[Variant]  # metafast's, then the others', the strongest first: time may run out
    flops: float
    traffic: float  # bytes that have to be read or written at least once
    expected: Callable[[str | None], Sequence[Tensor]]  # metric (None: the case's own) -> the right results
    targets: Sequence[Target] = ()
    tolerance: float = 1e-4  # of metafast: float32 sums of thousands of terms, in any order
    other_flops: Mapping[str, float] = field(default_factory=dict)  # of other algorithms for the same result
    exponentials: float = 0  # which take as long as products of matrices would, and longer
    opponents: float = 5  # how many times the tolerance is theirs; see `wrong_by`
    product_rate: float | None = None  # flops per second, where its products are not float32's


@dataclass
class Row:
    variant: str
    kind: str
    skipped: str | None = None
    error: float | None = None  # relative, against float64
    milliseconds: float | None = None  # median
    best_milliseconds: float | None = None
    rounds: int = 0
    times_floor: float | None = None
    times_metafast: float | None = None  # how many times as long as metafast
    peak_bytes: int | None = None  # beyond the arguments, of torch's allocator on CUDA


def floor_parts(case: Case, peak: Peak) -> dict[str, float]:
    """Seconds of what bounds a case."""
    return {
        "matrix products": case.flops / (case.product_rate or peak.arithmetic),
        "exponentials": case.exponentials / peak.exponentials if case.exponentials else 0.0,
        "memory": case.traffic / peak.bandwidth,
    }


def floor_of(case: Case, peak: Peak, flops: float | None = None) -> float:
    """Seconds; with `flops`, of another algorithm."""
    parts = floor_parts(case if flops is None else dataclasses.replace(case, flops=flops), peak)
    return max(parts["matrix products"] + parts["exponentials"], parts["memory"])


# --- are the results right? -------------------------------------------------------------------------------


def wrong_by(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the results, in the Euclidean norm, found where the expected ones lie.

    Not in the maximum norm: where a relu's argument is almost 0, float32 may fall on the other side. An
    opponent may be `Case.opponents` times as far from float64 as metafast is held to: what rounding does in
    float32 differs by as much between formulations, where a sum cancels. What a wrong formula does is more.
    """
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if f.shape != e.shape:
            raise ValueError(f"result: expected shape {tuple(e.shape)}, got {tuple(f.shape)}")
        error = ((f.detach().to(e.device, torch.float64) - e).norm() / e.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


COMPILING = ("compiled", "jax")  # the first call of these compiles
CHECKING = 0.6  # of a case's time: the rest is for the clock


def _check(
    case: Case, row: Row, variant: Variant, clock: Clock, allowed: float
) -> tuple[Callable, float] | None:
    """The call, and the seconds that its first run took; or None, and the reason in the row."""
    try:
        results: list[object] = []
        with _peak_of(row, clock.device):
            call = variant.build()
            first = clock(lambda: results.append(call()))
        row.error = wrong_by(variant.collect(results.pop()), case.expected(variant.metric))
    except Skip as reason:
        row.skipped = str(reason)
    except torch.OutOfMemoryError:
        row.skipped = "out of memory"
    except Exception as error:  # an opponent's, or ours: neither ends the run
        row.skipped = f"raised {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    else:
        if row.error <= allowed:
            return call, first
        row.skipped = f"wrong by {row.error:.1e}, not timed"
    return None


@contextlib.contextmanager
def _peak_of(row: Row, device: torch.device) -> Iterator[None]:
    """Building is part of it: the memory of a CUDA graph is taken at its capture. JAX's is its own."""
    if device.type != "cuda" or row.kind == "jax":
        yield
        return
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    row.peak_bytes = torch.cuda.max_memory_allocated(device) - before


def run_case(
    case: Case, clock: Clock, plan: Plan, peak: Peak, memory_limit: float, deadline: Deadline
) -> list[Row]:
    """The fastest first. A row of metafast that is skipped is a failure: see `failures`."""
    rows = {v.name: Row(v.name, v.kind) for v in case.variants}
    calls, timed = {}, {}
    kept = (1 - CHECKING) * deadline.left()
    for variant in case.variants:
        row = rows[variant.name]
        if variant.peak_bytes > memory_limit:
            row.skipped = f"would take {variant.peak_bytes / GIB:.0f} GiB"
        elif not variant.is_ours and deadline.left() < kept + variant.build_s:
            row.skipped = "no time left"
        else:
            allowed = case.tolerance * (1 if variant.is_ours else case.opponents)
            checked = _check(case, row, variant, clock, allowed)
            if checked is None:
                continue
            call, first = checked
            if first > plan.once_s and variant.kind not in COMPILING:
                timed[variant.name] = [first]
            else:
                calls[variant.name] = call
    if calls:
        each = min(plan.variant_s, deadline.left() / len(calls))
        timed |= interleave(calls, clock, dataclasses.replace(plan, variant_s=each))
    floor = floor_of(case, peak)
    for name, samples in timed.items():
        seconds = statistics.median(samples)
        rows[name].milliseconds, rows[name].best_milliseconds = seconds * 1e3, min(samples) * 1e3
        rows[name].rounds = len(samples)
        rows[name].times_floor = seconds / floor
    ours = next(row for row in rows.values() if row.kind == "metafast").milliseconds
    for name in timed if ours else ():
        rows[name].times_metafast = rows[name].milliseconds / ours
    return sorted(rows.values(), key=lambda row: row.milliseconds or math.inf)


def failures(rows: Sequence[Row]) -> list[str]:
    """The rows of metafast that could not be timed, and why."""
    return [f"{row.variant}: {row.skipped}" for row in rows if is_ours(row.kind) and row.skipped]


# --- is it fast enough? -----------------------------------------------------------------------------------


def judge(case: Case, rows: Sequence[Row]) -> list[dict[str, object]]:
    """Each target, what was reached, and whether that is enough. Beside it what other ways to call reach."""
    verdicts: list[dict[str, object]] = []
    ours = next(r for r in rows if r.kind == "metafast")
    for target in case.targets if ours.milliseconds else ():
        if target.milliseconds is not None:
            goal, best = f"at most {target.milliseconds:g} ms", None
        elif target.gib is not None:
            if ours.peak_bytes is None:
                continue  # not CUDA
            goal, best = f"at most {target.gib:g} GiB", None
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
            if row is not ours and is_ours(row.kind) and row.milliseconds is not None
        )
        rival = f" ({best.variant})" if best else ""
        verdicts.append({"target": goal, "reached": text + rival + others, "value": value, "met": met})
    return verdicts


def _reached(target: Target, row: Row, rival: Row | None) -> tuple[float, str, bool]:
    """What a row reaches of a target, in words too, and whether that is enough."""
    if target.milliseconds is not None:
        return row.milliseconds, f"{row.milliseconds:.4g} ms", row.milliseconds <= target.milliseconds
    if target.gib is not None:
        gib = row.peak_bytes / GIB
        return gib, f"{gib:.3g} GiB", gib <= target.gib
    if rival is None:
        return row.times_floor, f"{row.times_floor:.2f} x floor", row.times_floor <= target.ratio
    ratio = rival.milliseconds / row.milliseconds
    return ratio, f"{ratio:.2f} times", ratio >= target.ratio


def verdict_line(verdict: Mapping[str, object]) -> str:
    return f"  {'met   ' if verdict['met'] else 'MISSED'} {verdict['target']}: {verdict['reached']}"


def table(case: Case, rows: Sequence[Row], verdicts: Sequence[Mapping[str, object]], peak: Peak) -> str:
    parts, floor = floor_parts(case, peak), floor_of(case, peak)
    bound = "memory" if floor == parts["memory"] else "arithmetic"
    lines = [f"\n{case.name}   floor {floor * 1e3:.4g} ms ({bound})"]
    if case.exponentials:
        lines.append("  " + ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in parts.items()))
    ours = next(row.milliseconds for row in rows if row.kind == "metafast")
    for algorithm, flops in case.other_flops.items() if ours else ():
        other = floor_of(case, peak, flops) * 1e3
        lines.append(
            f"  floor of the {algorithm}: {other:.4g} ms, of which metafast takes {ours / other:.1f} times"
        )
    width = max(len(row.variant) for row in rows)
    peaks = any(row.peak_bytes is not None for row in rows)
    lines.append(
        f"  {'':{width}} {'median ms':>10} {'best ms':>10} {'x floor':>8} {'x metafast':>10} {'error':>8}"
        + (f" {'peak GiB':>9}" if peaks else "")
    )
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"  {row.variant:{width}}    skipped: {row.skipped}")
            continue
        times = "" if row.times_metafast is None else f"{row.times_metafast:.2f}"
        memory = "" if row.peak_bytes is None else f" {row.peak_bytes / GIB:9.3g}"
        lines.append(
            f"  {row.variant:{width}} {row.milliseconds:10.4g} {row.best_milliseconds:10.4g} "
            f"{row.times_floor:8.1f} {times:>10} {row.error:8.0e}{memory}"
        )
    return "\n".join([*lines, *map(verdict_line, verdicts)])


def summary(case: Case, rows: Sequence[Row], verdicts: Sequence[Mapping[str, object]], peak: Peak) -> dict:
    """The same for the JSON file."""
    return {
        "case": case.name,
        "floor_ms": floor_of(case, peak) * 1e3,
        "floor_parts_ms": {part: seconds * 1e3 for part, seconds in floor_parts(case, peak).items()},
        "flops": case.flops,
        "other_flops": case.other_flops,
        "exponentials": case.exponentials,
        "traffic_bytes": case.traffic,
        "variants": [dataclasses.asdict(row) for row in rows],
        "targets": verdicts,
    }
