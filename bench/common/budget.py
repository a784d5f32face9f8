"""Shares out the time that there is; without torch, which takes seconds to import."""

from __future__ import annotations

import math
import signal
import sys
import time
from dataclasses import dataclass

from bench import STARTED


@dataclass(frozen=True)
class Deadline:
    """What a case may take. What it began before the end it finishes, at the cost of the later cases."""

    end: float = math.inf  # of time.perf_counter()

    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())


class Budget:
    """Shares `seconds` of the process (None: no end) over parts that come in the order of their weight.

    A part gets about twice an equal share of what is left, the last one all of it: so the first have most,
    and what one does not need goes to the next.
    """

    def __init__(self, seconds: float | None, parts: int) -> None:
        self.end = math.inf if seconds is None else STARTED + seconds
        self.parts = parts

    def share(self) -> Deadline | None:
        """Of the next part; None where no time is left."""
        left, parts = self.end - time.perf_counter(), self.parts
        self.parts -= 1
        if left <= 0:
            return None
        return Deadline(time.perf_counter() + left * 2 / (parts + 1))


def stop_at_sigterm() -> None:
    """What `timeout` sends ends the run as an exception does: reports are closed, its processes end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
