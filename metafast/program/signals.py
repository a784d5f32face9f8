"""Signals that end a run after its step, with its state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The exit statuses of programs that these ended."""


class Stopped(Exception):
    """A run has ended before its last step, because a signal came."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = STATUS[signal.Signals(number)]


@contextmanager
def heard() -> Iterator[Callable[[], int | None]]:
    """Within it, SIGTERM (which schedulers send) and SIGINT (Ctrl-C) are taken down, and do nothing else.

    The second ends the process at once, as signals do. One that whoever started the process has it ignore, as
    nohup does, stays ignored. Gives a function that says which was the first.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield lambda: None
        return
    handlers = {number: signal.getsignal(number) for number in STATUS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def hear(number: int, frame: object) -> None:
        came.append(number)
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, hear)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
