"""What a person sees of a training run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SMOOTHING = 0.95
_REFRESH = 0.1  # seconds between two updates of the bar, which cost more than a small step


class Progress:
    """Shows the smoothed loss, the score, episodes per second and the time left.

    Args:
        first: steps done before this run.
        steps: steps in all.
    """

    def __init__(self, first: int, steps: int) -> None:
        self._first = self._done = first
        self._steps = steps
        self._loss: float | None = None
        self._score = ""
        self._diverged = self._episodes = 0
        self._started = self._updated = time.perf_counter()
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._update()
        self._bar.stop()

    def advance(self, *, loss: float, episodes: int, diverged: int = 0) -> None:
        """One step of so many episodes is done; the inner loops of some of them may have diverged."""
        self._done += 1
        self._episodes += episodes
        self._diverged += diverged
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        if time.perf_counter() - self._updated > _REFRESH:
            self._update()

    def report(self, name: str, score: float) -> None:
        """A new figure for the score: a line of its own where there is no bar to show it."""
        self._score = f"  accuracy {score:.1%}" if name == "accuracy" else f"  {name} {score:.3f}"
        if not self._console.is_terminal:
            left = (self._steps - self._done) * (time.perf_counter() - self._started)
            self._console.print(
                f"step {self._done}/{self._steps}  {self._figures()}  "
                f"{left / (self._done - self._first):.0f} s left"
            )

    def _update(self) -> None:
        self._updated = time.perf_counter()
        if self._loss is not None:
            self._bar.update(self._task, completed=self._done, figures=self._figures(), refresh=True)

    def _figures(self) -> str:
        rate = self._episodes / (time.perf_counter() - self._started)
        diverged = f"  {self._diverged} diverged" if self._diverged else ""
        return f"loss {self._loss:.3f}{self._score}{diverged}  {rate:.1f} episodes/s"
