"""What compute-sanitizer runs again, by `make gpu-memcheck`: each op, and each way that a kernel runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import inner_loop_problems as inner_loop
import pytest
import test_in_place as in_place
import test_inner_loop
import torch
from parity import ODD, assert_parity, assert_second_order_parity, make
from record_ops import RecordOps
from rows import ROWS, Row
from test_emulated import INNER_LOOP_CASES, UNROLL_CASES, Unroll, unroll_with_gradients
from torch.utils._pytree import tree_map_only

import metafast
from metafast import reference

ROOT = Path(__file__).parent.parent
# Rows that run all kernels: each metric and each reduction has the same ones. Under a sanitizer a test takes
# seconds.
NAMES = (
    "prototypes",
    "pairwise_distance[euclidean]",
    "pairwise_distance[cityblock, weight]",
    "relation_scores[relu]",
    "prototypical_loss[sqeuclidean, mean]",
    "matching_loss[cityblock, none, ways]",
    "matching_log_probs[cosine]",
    "maml_loss[mse, shared]",
    "inner_sgd[cross_entropy, shared]",
    "conv_inner_sgd[cross_entropy, shared]",
    "conv_forward[pooled]",
    "task_conv2d",
    "sgd_update",
    "lstm_optimizer_step[2 layers]",
    "meta_lstm_unroll[1 layer]",
)
SANITIZED = [row for row in ROWS if row.name in NAMES]

SANITIZER = pytest.mark.sanitizer
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ON_CUDA = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def all_derivatives(row: Row, device: str) -> None:
    args = make(row, ODD[1], dtype=torch.float32, device=device)
    row.call(metafast)(*args)  # where no gradient is wanted, some have an op of its own
    assert_parity(row, args, torch.float32)
    if row.derivatives != 1:
        assert_second_order_parity(row, args, torch.float32)


def step_in_place(head: str, device: str) -> None:
    inputs, outputs = {"update": (2, 1), "gates": (2, 2)}[head]
    args = in_place.arguments(inputs, outputs, torch.float32, (130, 0, 1, 64, 33))
    expected = in_place.stepped(head, args)
    on_device = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    torch.testing.assert_close([t.cpu() for t in in_place.stepped(head, on_device)], expected)


@SANITIZER
@DEVICES
@pytest.mark.parametrize("row", SANITIZED, ids=str)
def test_every_op(row: Row, device: str) -> None:
    all_derivatives(row, device)


@SANITIZER
@DEVICES
@pytest.mark.parametrize("head", ["update", "gates"])
def test_the_op_in_place(head: str, device: str) -> None:
    step_in_place(head, device)


@SANITIZER
@INNER_LOOP_CASES
@ON_CUDA
def test_each_way_of_the_inner_loop(case: inner_loop.Case, backend: torch.device) -> None:
    test_inner_loop.test_maml_loss_and_its_gradients(case, torch.float32, backend)


@SANITIZER
@UNROLL_CASES
@pytest.mark.gpu
def test_each_way_of_the_unroll(case: Unroll) -> None:
    expected = unroll_with_gradients(reference, case, torch.float64)
    found = unroll_with_gradients(metafast, case, torch.float32, "cuda")
    # Ten times the emulator's tolerance: a GPU's fast exponential is off by several units in the last place.
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=1e-4 * max(scale, 1e-3))


# --- no GPU needed: is anything selected, and all? --------------------------------------------------------


def test_the_marks_select_tests() -> None:
    """With none, pytest ends with status 5, and so does `make gpu-memcheck`."""
    marks = ["-m", "gpu and sanitizer", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *marks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in ("every_op", "the_op_in_place", "each_way_of_the_inner_loop", "each_way_of_the_unroll"):
        assert f"test_sanitizer.py::test_{name}[" in done.stdout


def test_the_sanitizers_see_every_op() -> None:
    assert len(SANITIZED) == len(NAMES)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("metafast::")]
    with RecordOps() as record:
        for row in SANITIZED:
            all_derivatives(row, "cpu")
        step_in_place("update", "cpu")
    seen = {op.name().split(".")[0] for op in record.calls}
    assert seen == {name for name in names if has_kernel(name, "CPU")}
