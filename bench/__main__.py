"""All benchmarks, each in a process of its own, with a time for all of them."""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
import time
from pathlib import Path

from bench import FAMILIES
from bench.common.budget import Budget, stop_at_sigterm

RESULTS = Path(__file__).parent / "results"
GRACE_S = 30.0  # after its time a benchmark finishes what it began, for so long


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, metavar="S", help="about how long all may take")
    parser.add_argument("--quick", action="store_true", help="small and few: to see that all run")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="%(default)s")
    return parser.parse_args()


def run(name: str, options: argparse.Namespace, seconds: float) -> int:
    """-> the exit status. A benchmark that goes on and on is asked to end, and leaves what it has."""
    command = [sys.executable, "-m", f"bench.{name}", "--device", options.device]
    command += ["--out", str(options.out / f"{name}-{options.device.split(':')[0]}.json")]
    if math.isfinite(seconds):
        command += ["--seconds", f"{seconds:.0f}"]
    process = subprocess.Popen([*command, *(["--quick"] if options.quick else [])])
    try:
        return process.wait(seconds + GRACE_S if math.isfinite(seconds) else None)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def main(options: argparse.Namespace) -> None:
    stop_at_sigterm()
    budget, statuses = Budget(options.seconds, [1] * len(FAMILIES)), {}
    for name in FAMILIES:
        deadline, began = budget.share(), time.perf_counter()
        if deadline is None:
            print(f"bench.{name}: no time left", flush=True)
            continue
        statuses[name] = run(name, options, deadline.left())
        print(f"bench.{name}: status {statuses[name]} after {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(max(statuses.values(), default=0))


if __name__ == "__main__":
    main(parse())
