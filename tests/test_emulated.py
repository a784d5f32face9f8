"""The CUDA kernels on the CPU: parity and the same bits under every schedule, no report of a sanitizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import NamedTuple

import inner_loop_problems as inner_loop
import pytest
import test_inner_loop
import torch
from background import Job, each, run
from emulated_build import EMULATED_BACKEND, EMULATED_LIBRARY, ROOT, library, sanitized_library
from parity import (
    EVERY_ROW,
    ODD,
    assert_parity,
    assert_second_order_parity,
    make,
    second_order,
    value_and_grads,
)
from rows import Row, Sizes

import metafast
from metafast import reference

SEEDS = (0, 1, 2)
ON_THE_EMULATOR = pytest.mark.parametrize("backend", [EMULATED_BACKEND], indirect=True)
# Many blocks and tiles in float64; in float32 fewer terms, as second derivatives of many cancel.
CASES = pytest.mark.parametrize(
    ("sizes", "dtype"), [(ODD[2], torch.float64), (ODD[1], torch.float32)], ids=str
)


def set_seed(seed: int) -> None:
    ctypes.CDLL(str(library.result())).metafast_emulator_set_seed(ctypes.c_uint64(seed))


@EVERY_ROW
@CASES
@ON_THE_EMULATOR
@pytest.mark.parametrize("seed", SEEDS)
def test_parity_under_every_schedule(
    row: Row, sizes: Sizes, dtype: torch.dtype, seed: int, backend: torch.device
) -> None:
    args = make(row, sizes, dtype=dtype, device=backend)
    set_seed(seed)
    assert_parity(row, args, dtype)
    if row.derivatives != 1:
        assert_second_order_parity(row, args, dtype)


@EVERY_ROW
@CASES
@ON_THE_EMULATOR
def test_every_schedule_gives_the_same_bits(
    row: Row, sizes: Sizes, dtype: torch.dtype, backend: torch.device
) -> None:
    args, function = make(row, sizes, dtype=dtype, device=backend), row.call(metafast)
    results = []
    for seed in SEEDS:
        set_seed(seed)
        second = second_order(row, function, args) if row.derivatives != 1 else ()
        results.append([*value_and_grads(row, function, args), *second])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


# For each way that the inner loop runs: a warp, two, eight to a task, and eight to one in global memory.
INNER_LOOP_CASES = pytest.mark.parametrize(
    "case",
    [
        inner_loop.Case(loss="cross_entropy", lr="element", momentum=0.5),
        inner_loop.Case(tasks=2, widths=(3, 33, 17, 6), steps=2, lr="step and layer", per_task=True),
        inner_loop.Case(tasks=2, widths=(2, 60, 60, 1), steps=2, momentum=0.5),
        inner_loop.Case(tasks=2, widths=(3, 150, 150, 6), steps=1, loss="cross_entropy", lr="element"),
    ],
    ids=["warp", "small block", "large block", "staged"],
)


@INNER_LOOP_CASES
@pytest.mark.parametrize("dtype", inner_loop.TOLERANCE, ids=str)
@ON_THE_EMULATOR
def test_inner_loop_under_every_schedule(
    case: inner_loop.Case, dtype: torch.dtype, backend: torch.device
) -> None:
    results = []
    for seed in SEEDS:
        set_seed(seed)
        test_inner_loop.test_maml_loss_and_its_gradients(case, dtype, backend)
        problem = inner_loop.make(case, dtype)
        options = {"lr": problem.lr, **problem.options}
        loss = metafast.maml_loss(problem.params, *problem.data, **options, **problem.query_options)
        adapted = metafast.inner_sgd(problem.params, *problem.data[:2], **options)
        leaves = problem.leaves(query=True)
        results.append(
            [loss, *adapted, *inner_loop.gradients([loss], leaves), *inner_loop.gradients(adapted, leaves)]
        )
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


class Unroll(NamedTuple):
    """K steps of an LSTM optimizer or, with `gates`, a meta-LSTM, on tensors of so many coordinates."""

    hidden: int
    layers: int
    steps: int
    sizes: tuple[int, ...]
    gates: bool = False


# For each way that the unroll runs on the smallest GPU: up to 20 units in float32 on the tensor cores, and of
# many steps not every state is kept; else all in shared memory; weights, or in the backward everything, in
# global memory; more coordinates than the blocks take at once.
UNROLL_CASES = pytest.mark.parametrize(
    "case",
    [
        Unroll(hidden=5, layers=3, steps=7, sizes=(130, 0, 12)),
        Unroll(hidden=6, layers=2, steps=5, sizes=(70, 3), gates=True),
        Unroll(hidden=5, layers=2, steps=0, sizes=(70,), gates=True),
        Unroll(hidden=20, layers=1, steps=57, sizes=(40,)),
        Unroll(hidden=20, layers=2, steps=2, sizes=(700,), gates=True),
        Unroll(hidden=22, layers=1, steps=3, sizes=(70, 3), gates=True),
        Unroll(hidden=48, layers=2, steps=2, sizes=(70,)),
        Unroll(hidden=150, layers=3, steps=1, sizes=(30,), gates=True),
        Unroll(hidden=80, layers=1, steps=1, sizes=(8500,)),
    ],
    ids=[
        *("three layers", "gates", "no steps", "many steps", "tiles in turns", "shared"),
        *("given weights", "workspace", "turns"),
    ],
)


def unroll_with_gradients(
    module: ModuleType, case: Unroll, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """The results and, weighed by numbers of their own, their gradients. The same numbers everywhere."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    hidden, heads = case.hidden, 1 + case.gates
    weights = []
    for layer in range(case.layers):
        inputs = hidden if layer else 4 if case.gates else 2
        weights += [leaf(4 * hidden, inputs, scale=inputs**-0.5)]
        weights += [leaf(4 * hidden, hidden, scale=hidden**-0.5), leaf(4 * hidden)]
    weights += [leaf(heads, hidden + 2 * case.gates, scale=hidden**-0.5), leaf(heads)]
    grads = [leaf(case.steps, size) for size in case.sizes]
    params = [leaf(size) for size in case.sizes]
    blocks, rows = sum(-(-size // 64) for size in case.sizes), 2 * case.layers * hidden + 2 * case.gates
    state = leaf(blocks, rows, 64, scale=0.5)
    leaves = [*weights, *params, *grads, state]
    if case.gates:
        losses = leaf(case.steps).detach().abs()
        out, state = module.meta_lstm_unroll(params, grads, losses, state, weights)
    else:
        out, state = module.lstm_optimizer_unroll(grads, state, weights, params=params)
    results = [*out, state]
    total = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in results)
    return [t.detach() for t in (*results, *torch.autograd.grad(total, leaves, materialize_grads=True))]


@UNROLL_CASES
@pytest.mark.parametrize("dtype", inner_loop.TOLERANCE, ids=str)
@ON_THE_EMULATOR
def test_lstm_unroll_under_every_schedule(case: Unroll, dtype: torch.dtype, backend: torch.device) -> None:
    expected = unroll_with_gradients(reference, case, torch.float64)
    results = []
    for seed in SEEDS:
        set_seed(seed)
        results.append(unroll_with_gradients(metafast, case, dtype))
    inner_loop.assert_near(results[0], expected, dtype)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@ON_THE_EMULATOR
@pytest.mark.parametrize("steps", [1, 3])
def test_bfloat16_state_and_one_at_an_odd_address(steps: int, backend: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(steps, size, generator=generator) for size in (70, 3)]
    cell = metafast.CoordinatewiseLSTM(20, 1)
    state = torch.randn(3, 40, 64, generator=generator).bfloat16()
    wide, expected = metafast.lstm_optimizer_unroll(grads, state.float(), cell.weights)
    same, rounded = metafast.lstm_optimizer_unroll(grads, state, cell.weights)
    assert all(map(torch.equal, same, wide))
    assert torch.equal(rounded, expected.bfloat16())
    odd = torch.cat((torch.zeros(1), state.float().flatten()))[1:].view_as(state)
    found = metafast.lstm_optimizer_unroll(grads, odd, cell.weights)
    for one, other in zip((*found[0], found[1]), (*wide, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def sanitizer_runtimes(library: Path) -> list[str]:
    """Those that a library needs. They must come first in a process, so Python is to be started with them."""
    needed = subprocess.run(["ldd", str(library)], check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in needed.splitlines())
    return [line[2] for line in lines if line[0].startswith(("libasan.", "libubsan."))]


def _sanitized(tests: Sequence[str]) -> CompletedProcess[str]:
    library = sanitized_library.result()
    if not library.exists():
        pytest.skip("the C++ compiler has no shared runtime of the sanitizers")
    environment = {
        EMULATED_LIBRARY: str(library),
        "LD_PRELOAD": ":".join(sanitizer_runtimes(library)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until it exits
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # Without capture: a sanitizer's report goes straight to standard error and ends the process.
    pytest_again = [sys.executable, "-m", "pytest", "-q", "--capture=no", "-p", "no:cacheprovider"]
    return run([*pytest_again, *tests, "-k", "emulated"], cwd=ROOT, env=os.environ | environment)


SANITIZED = {
    "contract": ["tests/test_contract.py"],
    "families": [
        "tests/test_pairwise.py",
        "tests/test_convolutional_autocast.py",
        "tests/test_emulated.py::test_inner_loop_under_every_schedule",
        "tests/test_emulated.py::test_lstm_unroll_under_every_schedule",
    ],
}
SANITIZED_JOBS = {name: Job(partial(_sanitized, tests), minutes=4) for name, tests in SANITIZED.items()}


@each(SANITIZED_JOBS)
def test_sanitizers_report_nothing(job: Job[CompletedProcess[str]]) -> None:
    result = job.result()
    assert result.returncode == 0, result.stdout + result.stderr
