"""Long commands whose results tests judge: builds, compilers, tests again on another machine or build.

They would leave one core waiting. So a test names its command, `@pytest.mark.needs(job)`; such tests come
last in a session, and their jobs run in a thread beside the tests before them, the longest first. The longest
is judged last, and a test whose job nobody has begun runs it itself; so does a test that is run alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

import pytest

Result = TypeVar("Result")


class Job(Generic[Result]):
    """A function that runs once, in the background or in the first test that asks for its result.

    It may end in pytest.skip or pytest.fail, and so does then every test that asks. `minutes`: about how long
    it takes on two cores, with the jobs that it asks itself.
    """

    def __init__(self, run: Callable[[], Result], *, minutes: float) -> None:
        self.minutes = minutes
        self._run = run
        self._lock = threading.Lock()  # held while it runs: whoever else asks, waits
        self._future: Future[Result] | None = None

    def result(self) -> Result:
        with self._lock:
            if self._future is None:
                self._future = Future()
                try:
                    self._future.set_result(self._run())
                except BaseException as error:
                    self._future.set_exception(error)
        return self._future.result()


_stopped = threading.Event()
_running: set[subprocess.Popen[str]] = set()


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with the output captured. The end of the session ends what still runs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as process:
        _running.add(process)
        if _stopped.is_set():
            _kill(process)
        stdout, stderr = process.communicate()
        _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a compiler driver's compilers too


def each(jobs: Mapping[str, Job[Any]]) -> pytest.MarkDecorator:
    """Parametrizes `job`: a test of each, by name."""
    return pytest.mark.parametrize(
        "job", [pytest.param(job, id=name, marks=pytest.mark.needs(job)) for name, job in jobs.items()]
    )


def needed(item: pytest.Item) -> Job[Any] | None:
    mark = item.get_closest_marker("needs")
    return mark.args[0] if mark else None


def _in_order(items: Sequence[pytest.Item]) -> list[Job[Any]]:
    jobs = dict.fromkeys(job for job in map(needed, items) if job is not None)
    return sorted(jobs, key=lambda job: job.minutes)


def order(items: list[pytest.Item]) -> None:
    """First the quiet tests, then those without a job, then those of the shortest job, ... of the longest."""
    rank = {job: i for i, job in enumerate(_in_order(items))}
    items.sort(key=lambda item: -2 if item.get_closest_marker("quiet") else rank.get(needed(item), -1))


def start(items: Sequence[pytest.Item]) -> None:
    jobs = _in_order(items)[::-1]

    def work() -> None:
        for job in jobs:
            with suppress(BaseException):  # which the tests will see
                job.result()
            if _stopped.is_set():
                return

    threading.Thread(target=work, daemon=True).start()


def stop() -> None:
    _stopped.set()
    for process in list(_running):
        _kill(process)
