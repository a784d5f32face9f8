"""What a person sees of a training run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from metafast.program.console import mute

_REFRESH = 0.1  # seconds between two updates of the bar, which cost more than a small step
_HIDDEN = {"step", "loss", "lr", "seconds", "episodes_per_second", "diverged", "error"}


class Progress:
    """Shows the step, the loss, the figure beside it and the time left: what the log has under these names.

    Args:
        first: steps done before this run.
        steps: steps in all.
        quiet: shows nothing: another process does.
    """

    def __init__(self, first: int, steps: int, *, quiet: bool = False) -> None:
        self._first = self._done = first
        self._steps = steps
        self._loss: float | None = None
        self._figure = ""
        self._diverged = 0
        self._started = self._updated = time.perf_counter()
        self._console = _Console(stderr=True, quiet=quiet)
        # All but the bar has its room, whatever the width of the terminal.
        whole = {"no_wrap": True, "overflow": "ignore"}
        self._bar = Bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(**whole)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[figures]}", table_column=Column(**whole)),
            TimeRemainingColumn(compact=True, table_column=Column(**whole)),
            TextColumn("left", table_column=Column(**whole)),
            console=self._console,
            auto_refresh=False,
            expand=True,
            disable=quiet or not self._console.is_terminal,
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

    def advance(self, done: int, loss: float) -> None:
        """So many steps are done; the loss of the last."""
        self._done, self._loss = done, loss
        if time.perf_counter() - self._updated > _REFRESH:
            self._update()

    def report(self, record: Mapping[str, Any]) -> None:
        """A record of the log: a line of its own where there is no bar to show it."""
        self._diverged += record.get("diverged", 0)
        if "seconds" not in record:
            return
        figures = {name: value for name, value in record.items() if name not in _HIDDEN}
        self._figure = "".join(f"  {name} {_said(name, value)}" for name, value in figures.items())
        if not self._console.is_terminal:
            left = (self._steps - self._done) * (time.perf_counter() - self._started)
            rate = record["episodes_per_second"]
            self._console.print(
                f"step {self._done}/{self._steps}  {self._figures()}  {rate:.1f} episodes/s  "
                f"{left / (self._done - self._first):.0f} s left",
                soft_wrap=True,
            )

    def tell(self, line: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(line, soft_wrap=True, highlight=False)

    def _update(self) -> None:
        self._updated = time.perf_counter()
        if self._loss is not None:
            self._bar.update(self._task, completed=self._done, figures=self._figures(), refresh=True)

    def _figures(self) -> str:
        diverged = f"  {self._diverged} diverged" if self._diverged else ""
        return f"loss {self._loss:.3g}{self._figure}{diverged}"


def _said(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3g}"


class _Console(Console):
    """One whose reader may go away (``2>&1 | head``) without an end to the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute(self.file)
