"""Shares out the time that there is; without torch, which takes seconds to import."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench import STARTED


@dataclass(frozen=True)
class Deadline:
    """What a case may take. What it began before the end it finishes, at the cost of the later cases."""

    end: float = math.inf  # of time.perf_counter()

    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())


class Budget:
    """Shares `seconds` of the process (None: no end) over parts, the most important first.

    A part gets about twice the share of what is left that its weight is of the weights left, the last one all
    of it: so of equal weights the first have most, and what one does not need goes to the next.
    """

    def __init__(self, seconds: float | None, weights: Sequence[float]) -> None:
        self.end = math.inf if seconds is None else STARTED + seconds
        self.weights = list(weights)

    def share(self) -> Deadline | None:
        """Of the next part; None where no time is left."""
        left, all_weights = self.end - time.perf_counter(), sum(self.weights)
        weight = self.weights.pop(0)
        if left <= 0:
            return None
        return Deadline(time.perf_counter() + left * 2 * weight / (all_weights + weight))


def stop_at_sigterm() -> None:
    """What `timeout` sends ends the run as an exception does: reports are closed, its processes end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
