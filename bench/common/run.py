"""Runs the benchmarks of a family: `python -m bench.FAMILY`.

What is measured comes in the order of its weight, and is written after every case. `--seconds` is shared over
them; a run that is stopped, or whose time is up, leaves what it has. float32 is IEEE's for everyone: TF32 is
off in torch and in JAX, except in the cases that say so.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.budget import Budget, Deadline, stop_at_sigterm
from bench.common.cases import Case, failures, judge, run_case, summary, table
from bench.common.clock import Clock, Plan
from bench.common.machine import GIB, Peak, measure_peak
from bench.common.report import Report

QUICK = Plan(variant_s=0.1, max_rounds=5)
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Run:
    """What a study is given."""

    options: argparse.Namespace
    report: Report
    clock: Clock
    plan: Plan
    peak: Peak
    deadline: Deadline


Study = Callable[[Run], list[dict[str, Any]]]


@dataclass(frozen=True)
class Family:
    name: str
    description: str
    # (device, quick) -> name and what builds the case, the most important first. Built one after the other,
    # so that one case's data is gone before the next one's comes.
    cases: Callable[[torch.device, bool], Iterator[tuple[str, Callable[[], Case]]]]
    plan: Plan = field(default_factory=Plan)
    exponentials: bool = False  # the floors of its cases count some
    fma: bool = False  # the floors are of the FMA peak, not of the library's sgemm
    weight: Callable[[str], float] = lambda name: 1  # of a case or study in the sharing of the time
    # What is measured beside the cases, for the report; rows with a "target" are judged by it.
    studies: Mapping[str, Study] = field(default_factory=dict)


def parse(
    name: str, description: str, add_more: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU cores for every variant (2; with a GPU all)")
    parser.add_argument("--quick", action="store_true", help="small and few: to see that it runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--seconds", type=float, metavar="S", help="about how long the run may take")
    parser.add_argument("--memory", type=float, metavar="GIB", help="skip what takes more (6; of a GPU half)")
    default_out = f"bench/results/{name}-<device>.json"
    parser.add_argument("--out", type=Path, help=f"JSON file; of a full run by default {default_out}")
    add_more(parser)
    options = parser.parse_args()
    cuda = options.device.type == "cuda"
    if options.out is None and not options.quick and not options.only:
        options.out = RESULTS / f"{name}-{options.device.type}.json"
    if options.memory is None:
        options.memory = (
            torch.cuda.get_device_properties(options.device).total_memory / 2 / GIB if cuda else 6
        )
    if options.threads is None:
        options.threads = os.cpu_count() if cuda else 2
    # The same cores for everyone: torch, metafast and JAX, which has no setting of its own.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    return options


def main(family: Family) -> None:
    options = parse(family.name, family.description)
    stop_at_sigterm()
    with Report(family.name, options) as report:
        failed = run(family, options, report)
    sys.exit(1 if failed else 0)


def run(family: Family, options: argparse.Namespace, report: Report) -> list[str]:
    """-> what of metafast failed, which is more than to miss a target."""
    parts: dict[str, Callable[[Run], Findings]] = {
        name: functools.partial(_case, build) for name, build in family.cases(options.device, options.quick)
    }
    parts |= {name: functools.partial(_study, name, study) for name, study in family.studies.items()}
    parts = {name: part for name, part in parts.items() if options.only in name}
    budget = Budget(options.seconds, [family.weight(name) for name in parts])
    clock, plan = Clock(options.device), QUICK if options.quick else family.plan
    peak = measure_peak(clock, options.quick, family.exponentials, family.fma)
    report.say(str(peak))
    if family.fma and options.device.type == "cpu" and peak.fma is None:
        report.say("no C compiler (cc) to measure the FMA peak with: the floors are of sgemm")
    report.content |= {
        "sgemm_flops": peak.flops,
        "fma_flops": peak.fma,
        "exponentials": peak.exponentials,
        "bandwidth_bytes": peak.bandwidth,
    }
    missed, failed = [], []
    for name, part in parts.items():
        deadline = budget.share()
        if deadline is None:
            report.say(f"\n{name}: no time left")
            continue
        try:
            found = part(Run(options, report, clock, plan, peak, deadline))
        except Exception as error:  # a part that fails leaves the others
            failed.append(f"{name}: raised {type(error).__name__}: {error}")
            report.say(f"\n{failed[-1]}")
            continue
        missed += [f"{of}: {v['target']}: {v['reached']}" for of, v in found.verdicts if not v["met"]]
        failed += [f"{name}: {failure}" for failure in found.failures]
    for what, lines in {"missed targets": missed, "failed": failed}.items():
        if lines:
            report.say("\n".join([f"\n{what}:", *(f"  {line}" for line in lines)]))
    return failed


class Findings(NamedTuple):
    verdicts: list[tuple[str, Mapping[str, Any]]]  # on what, and as `judge` gives them
    failures: list[str]


def _case(build: Callable[[], Case], run: Run) -> Findings:
    torch._dynamo.reset()  # every case compiles for its own shapes
    torch.manual_seed(0)
    case = build()
    rows = run_case(case, run.clock, run.plan, run.peak, run.options.memory * GIB, run.deadline)
    verdicts = judge(case, rows)
    run.report.say(table(case, rows, verdicts, run.peak))
    run.report.add(summary(case, rows, verdicts, run.peak))
    return Findings([(case.name, verdict) for verdict in verdicts], failures(rows))


def _study(name: str, study: Study, run: Run) -> Findings:
    rows = run.report.content[name] = study(run)
    run.report.write()
    return Findings([(row["workload"], row["target"]) for row in rows if "target" in row], [])
