"""Ctrl-C within a long CPU kernel: it ends at once, with KeyboardInterrupt, and the process computes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process sends itself signals")

# Each call would take 20 seconds and more, products of the library 10: with the slowest kernels, so that
# little memory is enough for that.
LONG_CALLS = """
import os, signal, sys, threading, time
os.environ["METAFAST_CPU_ISA"] = "baseline"
import torch, metafast
from metafast.ops.convolutional import _encoded
ops = torch.ops.metafast
torch.set_num_threads(int(sys.argv[1]))

def mlp(*widths):
    return [torch.randn(s) / i**0.5 for i, o in zip(widths, widths[1:]) for s in ((o, i), (o,))]

def pairwise(metric="cityblock", queries=4000, features=4096):  # one task's chunks of queries, in tiles
    x, out = torch.randn(1, queries, features), torch.full((1, queries, queries), 2.0 * features)
    yield lambda: ops.pairwise(x, x, None, None, metric)
    yield lambda: ops.pairwise_backward(out, x, x, None, None, out, metric)

def products():  # of the library
    return pairwise("sqeuclidean", 12000, 4096)

def classify(queries=6000):
    x, labels = torch.randn(1, queries, 4096), torch.arange(queries).remainder(5)[None]
    arguments = x, labels, x, labels, None, 5, "matching", "sqeuclidean", 1.0, 1
    yield lambda: ops.classify(*arguments)
    yield lambda: ops.classify_with_gradients(*arguments)

def many_tasks():
    params, data = mlp(1, 40, 40, 1), [torch.randn(80000, 10, 1) for _ in range(4)]
    lr, rest = [torch.tensor(0.01)], (None, None, None, "mse", 100, "relu", 0.0, False, True)
    one = torch.tensor(1.0)
    yield lambda: ops.maml_loss(params, *data, lr, *rest)
    yield lambda: ops.maml_loss_backward(one, params, *data, lr, *rest, [True] * 9)

def one_task():  # nothing but its steps to stop between
    params, x, y = mlp(64, 256, 256, 10), torch.randn(1, 25, 64), torch.randn(1, 25, 10)
    grads = [torch.ones(1, *p.shape) for p in params]
    lr, rest = [torch.tensor(0.001)], (None, "mse", 60000, "relu", 0.0, False)
    yield lambda: ops.inner_sgd(params, x, y, lr, *rest)
    yield lambda: ops.inner_sgd_backward(grads, params, x, y, lr, *rest, [True] + [False] * 4)

def lstm(shapes=[(80, 2), (80, 20), (80,), (80, 20), (80, 20), (80,), (1, 20), (1,)]):
    weights = [torch.randn(shape) / 10 for shape in shapes]
    params, grads = [torch.randn(2000000)], [torch.randn(20, 2000000)]
    state = metafast.lstm_optimizer_state(params, hidden=20, layers=2)
    arguments = grads, params, None, state, weights, "update", "log_sign", 10.0, 0.1, True
    yield lambda: ops.lstm_unroll(*arguments)
    yield lambda: ops.lstm_unroll_backward(grads, None, *arguments, [True] * 5)

def convolutional(images=20, steps=3000):  # many steps of one task, then many tasks
    block = metafast.ConvBlock(3, padding=1, activation="tanh")
    network = [block, metafast.ConvBlock(3, padding=1, pool="average"), metafast.ConvBlock(None)]
    def params(width):
        shapes = (width, 1, 3, 3), (width,), (width, width, 3, 3), (width,), (1, width), (1,)
        return [torch.randn(shape) / 8 for shape in shapes]
    theta, x, y = params(16), torch.randn(1, images, 1, 28, 28), torch.randn(1, images, 1)
    yield lambda: metafast.conv_inner_sgd(network, theta, x, y, loss="mse", lr=0.001, steps=steps)
    numbers, eps = _encoded(network)
    grads = [torch.ones(1, *p.shape) for p in theta]
    kept = torch.randn(1, steps, 1, sum(p[0].numel() * 16 for p in theta)) / 8
    given = theta, x, y, [torch.tensor(0.001)], None, kept, numbers, eps, "mse", steps, 0.0, False, None
    yield lambda: ops.conv_inner_sgd_backward(grads, *given, [True] + [False] * 4)
    wide, many = params(64), torch.randn(1000, images, 1, 28, 28)
    yield lambda: metafast.conv_forward(network, wide, many)

def through_autograd():  # a backward of four seconds, since somebody has to wait for its forward
    params, data = mlp(1, 40, 40, 1), [torch.randn(1500, 10, 1) for _ in range(4)]
    params = [param.requires_grad_() for param in params]
    yield metafast.maml_loss(params, *data, loss="mse", lr=0.01, steps=100, reduction="none").sum().backward

def small():
    params, data = mlp(1, 40, 40, 1), [torch.ones(100, 10, 1) for _ in range(4)]
    x = torch.ones(100, 30, 64).cumsum(1)
    loss = metafast.maml_value_and_grad([p * 0 + 1e-2 for p in params], *data, loss="mse", lr=0.01, steps=1)
    return [loss[0], *loss[1], metafast.pairwise_distance(x, x[:, :10])]

expected = small()
for calls in (pairwise, products, classify, many_tasks, one_task, lstm, convolutional, through_autograd):
    for call in calls():
        sent = []
        def interrupt():
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        try:
            threading.Timer(0.5, interrupt).start()
            call()
            raise SystemExit(f"{calls.__name__} came to its end")
        except KeyboardInterrupt:
            print(f"{calls.__name__} {time.perf_counter() - sent[0]:.3f}")
        assert all(map(torch.equal, small(), expected)), calls
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_kernel_ends_soon_after_an_interrupt(threads: int) -> None:
    command = [sys.executable, "-c", LONG_CALLS, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 16
    assert [line for line in lines if float(line.split()[1]) > 4] == [], result.stdout


@pytest.fixture
def after() -> Iterator[Any]:
    """after(seconds, handler): SIGALRM comes, with this handler."""
    before = signal.getsignal(signal.SIGALRM)

    def set_timer(seconds: float, handler: Any) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield set_timer
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_nothing_computes_within_the_kernel_and_changes_nothing(after: Any) -> None:
    """It finds the kernels' memory and autograd as it would between two calls."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 40), (64,), (64, 64), (64,), (1, 64), (1,)]
    params = [torch.randn(shape, generator=generator) / 8 for shape in shapes]
    x, y = torch.randn(1, 40, 40, generator=generator), torch.randn(1, 40, 1, generator=generator)

    def adapted(steps: int) -> list[Tensor]:  # of one task, whose handler therefore comes between its steps
        return metafast.inner_sgd(params, x, y, loss="mse", lr=0.01, steps=steps)

    def gradient() -> Tensor:
        start = params[0].clone().requires_grad_()
        loss = metafast.maml_loss([start, *params[1:]], x, y, x, y, loss="mse", lr=0.01, steps=3)
        return torch.autograd.grad((loss * start.square().sum()), start)[0]

    began = time.perf_counter()
    adapted(1000)
    steps = int(1000 * 0.6 / (time.perf_counter() - began)) + 1000
    expected, expected_gradient = adapted(steps), gradient()
    within: list[tuple[float, Tensor]] = []
    after(0.05, lambda *_: within.append((time.perf_counter(), gradient())))
    result = adapted(steps)
    assert within
    assert time.perf_counter() - within[0][0] > 0.1, "it came when the call had ended"
    assert within[0][1].equal(expected_gradient)
    assert all(map(torch.equal, result, expected))
