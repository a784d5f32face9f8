"""What a person sees of a training run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SMOOTHING = 0.95


class Progress:
    """Shows the smoothed loss, the accuracy, episodes per second and the time left.

    Args:
        first: steps done before this run.
        steps: steps in all.
    """

    def __init__(self, first: int, steps: int) -> None:
        self._first = self._done = first
        self._steps = steps
        self._loss: float | None = None
        self._episodes = 0
        self._started = time.perf_counter()
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}"),
            TextColumn("{task.fields[rate]:.1f} episodes/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        nan = float("nan")
        self._task = self._bar.add_task(
            "training", total=steps, completed=first, loss=nan, accuracy=nan, rate=nan
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, *, loss: float, episodes: int) -> None:
        """One step of so many episodes is done."""
        self._done += 1
        self._episodes += episodes
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        self._bar.update(self._task, completed=self._done, loss=self._loss, rate=self._rate())

    def report(self, *, accuracy: float) -> None:
        """A new figure for the accuracy: a line of its own where there is no bar to show it."""
        self._bar.update(self._task, accuracy=accuracy)
        if not self._console.is_terminal:
            left = (self._steps - self._done) * (time.perf_counter() - self._started)
            self._console.print(
                f"step {self._done}/{self._steps}  loss {self._loss:.3f}  accuracy {accuracy:.1%}  "
                f"{self._rate():.1f} episodes/s  {left / (self._done - self._first):.0f} s left"
            )

    def _rate(self) -> float:
        return self._episodes / (time.perf_counter() - self._started)
