"""Threads of the CPU kernels: beside busy processes, of many callers, after a fork, as many as torch says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import metafast

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="asks Linux for cores and threads"
)


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "ThreadSanitizer"])
def test_shares(sanitize: bool, tmp_path: Path) -> None:
    """They run once, exceptions and interrupts arrive, the child of a fork computes on; and no race."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    assert compiler, "the extension was built with a C++ compiler, so there is one"
    flags = ["-fsanitize=thread", "-g"] if sanitize else []
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    program = tmp_path / "shares"
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-fopenmp", *flags, "-o", str(program)]
    if (
        subprocess.run([*command, empty], capture_output=True).returncode
        or subprocess.run([program]).returncode
    ):
        pytest.skip(f"no program runs with {flags} here")
    sources = [ROOT / "tests/threads/shares.cpp", ROOT / "csrc/common/threads.cpp"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", *sources], check=True)
    arguments = ["no-fork"] if sanitize else []  # after which ThreadSanitizer starts no thread
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


BESIDE_BUSY_PROCESSES = """
import os, statistics, subprocess, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # the busy ones stay there as well
import torch, metafast

def sine(tasks):
    widths = [(1, 40), (40, 40), (40, 1)]
    params = [torch.randn(*shape) / i**0.5 for i, o in widths for shape in ((o, i), (o,))]
    data = [torch.randn(tasks, 10, 1) for _ in range(4)]
    return lambda: metafast.maml_value_and_grad(params, *data, loss="mse", lr=0.01, steps=1)

def lstm(coordinates):
    shapes = [(80, 2), (80, 20), (80,), (80, 20), (80, 20), (80,), (1, 20), (1,)]
    weights = [torch.randn(shape) / 10 for shape in shapes]
    params, grads = [torch.randn(coordinates)], [torch.randn(coordinates)]
    state = metafast.lstm_optimizer_state(params, hidden=20, layers=2)
    return lambda: metafast.lstm_optimizer_step_(params, grads, state, weights)

def prototypical(episodes):
    support, query = torch.randn(episodes, 5, 64), torch.randn(episodes, 75, 64)
    labels = torch.arange(5).repeat(episodes, 1)
    return lambda: metafast.prototypical_loss(support, labels, query, labels.repeat(1, 15), 5)

def distances(queries):
    x, y = torch.randn(queries, 256), torch.randn(256, 256)
    return lambda: metafast.pairwise_distance(x, y)

def timed(call, count):  # in a row: whoever waits for its turn on a core does so in some call or other
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count

calls = {"sine waves, 25 tasks": sine(25), "256 tasks": sine(256), "LSTM step": lstm(2000),
         "prototypical loss": prototypical(64), "products of the library": distances(1024)}
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
try:
    for name, call in calls.items():
        torch.set_num_threads(1)
        best = min(timed(call, 1) for _ in range(20))
        samples = {1: [], 2: []}
        for _ in range(7):
            for threads in samples:
                torch.set_num_threads(threads)
                samples[threads].append(timed(call, 1 + int(0.02 / best)))
        one, two = (statistics.median(samples[threads]) * 1e3 for threads in (1, 2))
        alone = f"{best * 1e3:.3f} undisturbed"
        print(f"{two / one:.2f}|{name}: {one:.3f} ms on one thread, {two:.3f} on two, {alone}")
finally:
    for process in busy:
        process.kill()
"""


@pytest.mark.quiet
def test_two_threads_beside_busy_processes_are_no_slower_than_one() -> None:
    """Where a call waits for a thread that the system has not scheduled, they can take 100 times as long."""
    for _ in range(3):  # a ratio of medians; but the machine may have other work beside this
        lines = run_python(BESIDE_BUSY_PROCESSES).splitlines()
        slow = [line for line in lines if float(line.split("|")[0]) > 1.5]
        if not slow:
            return
    pytest.fail("\n".join(slow))


def example(tasks: int = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    params = [torch.randn(shape, generator=generator) / 3 for shape in shapes]
    data = [torch.randn(tasks, 10, 1, generator=generator) for _ in range(4)]
    value, grads = metafast.maml_value_and_grad(params, *data, loss="mse", lr=0.01, steps=2)
    return [value, *grads]


def test_many_callers_at_once(threads: None) -> None:
    torch.set_num_threads(1)
    expected = example()
    differ: list[object] = []

    def call(number: int) -> None:
        try:
            torch.set_num_threads(2 + number % 2)
            for _ in range(20):
                differ.extend(
                    1 for one, other in zip(example(), expected, strict=True) if not one.equal(other)
                )
        except Exception as error:
            differ.append(error)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert differ == []


def test_a_forked_process_computes_on(threads: None) -> None:
    """As a data loader's worker may, alone: a fork takes none of the other threads along."""
    torch.set_num_threads(3)
    expected = example()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if all(map(torch.equal, example(), expected)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(torch.equal, example(), expected))


def test_torch_too_computes_on_in_a_forked_process() -> None:
    """With kernels and around them, on the thread that is left."""
    work = (
        "import os, signal, torch, metafast\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(75, 400, 64).transpose(0, 1)\n"
        "def results():\n"
        "    leaf = x.detach().requires_grad_()\n"  # strides that are no kernel's
        "    distances = metafast.pairwise_distance(leaf, leaf[:, :20])\n"
        "    distances.square().sum().backward()\n"
        "    return leaf.grad, x[:, 0].mm(x[:, 0].T)\n"
        "metafast.pairwise_distance(x, x[:, :20])\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(20)\n"  # should it wait for threads that only its parent has
        "    results()\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())"
    )
    assert run_python(work).split() == ["0", "2"]


def test_as_many_threads_as_torch_says() -> None:
    """And where that falls, those beyond it rest."""
    work = (
        "import torch, metafast, time\n"
        "from pathlib import Path\n"
        "x = torch.randn(400, 75, 64)\n"
        "def times():\n"  # of all threads, in nanoseconds
        "    return {t.name: int((t / 'schedstat').read_text().split()[0])\n"
        "            for t in Path('/proc/self/task').iterdir()}\n"
        "def ran(threads):\n"
        "    torch.set_num_threads(threads)\n"
        "    metafast.pairwise_distance(x, x[:, :20])\n"
        "    time.sleep(0.1)\n"  # until those that were more have ended and the others rest
        "    before = times()\n"
        "    for _ in range(50): metafast.pairwise_distance(x, x[:, :20]); time.sleep(0.001)\n"
        "    return sum(ns > before.get(name, 0) for name, ns in times().items())\n"
        "for threads in (1, 4, 4, 2, 1): print(ran(threads))"
    )
    assert run_python(work).split() == ["1", "4", "4", "2", "1"]


@pytest.mark.parametrize("rows", [20, 512])  # our own tiles; products of the library
def test_subnormal_numbers_are_zero_on_every_thread(rows: int, threads: None) -> None:
    x = torch.full((1024, 256), 1e-20)
    for count in (1, 4):
        torch.set_num_threads(count)
        assert metafast.pairwise_distance(x, x[:rows], metric="dot").count_nonzero() == 0
