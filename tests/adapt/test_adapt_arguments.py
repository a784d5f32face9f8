"""Bad input to adapt: an error that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import mlp
from torch import nn

import metafast


@pytest.mark.parametrize("path", [None, "torch.func", "loop"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss: expected 'mse', 'cross_entropy' or a function, got 'hinge'"),
        ({"loss": 3}, "loss: expected 'mse', 'cross_entropy' or a function, got 3"),
        ({"steps": -1}, "steps: expected a number >= 0, got -1"),
        ({"x": torch.zeros(3)}, r"x: expected shape \[T, S, ...\], got \[3\]"),
        ({"y": torch.zeros(2, 4, 2)}, r"y: expected shape \[T, S, ...\] with T = 3, got \[2, 4, 2\]"),
        ({"y": torch.zeros(3, 4, 1)}, r"y: expected .*\[.*2\], got \[.*1\]"),
        (
            {"params": "head"},
            "params: expected names of parameters that require grad, or prefixes, got 'head'",
        ),
        ({"lr": [0.1, 0.1]}, "lr: expected one for each of 0.weight, .*, got 2"),
        ({"lr": {"0.weight": 0.1}}, "lr: expected one for each of .*; check 0.bias, 2.bias"),
        (
            {"lr": [torch.zeros(7)] * 6},
            r"lr: expected for 0.weight what broadcasts to its shape, \[6, 3\], got \[7\]",
        ),
        ({"lr": torch.zeros(2)}, "lr: expected"),
        ({"lr": -0.1}, r"lr: expected a number >= 0, got -0.1"),
        ({"lr": [0.1, -0.1] * 3}, r"lr: expected a number >= 0, got -0.1"),
        ({"momentum": -1}, "momentum: expected a number >= 0, got -1"),
        ({"weight_decay": -1}, "weight_decay: expected a number >= 0, got -1"),
        ({"x": torch.zeros(3, 4, 7)}, r"x: expected .*7"),
        ({"x": torch.zeros(3, 4, 3).double()}, "x: expected .*"),
        (
            {"loss": "cross_entropy", "y": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 2, -100]])},
            r"y: expected classes in \[0, 2\) or -100 \(ignored\), got 2 at position 2 of task 2",
        ),
        (
            {"loss": "cross_entropy", "y": torch.zeros(3, 5, dtype=torch.int64)},
            r"y: expected .*\[.*\], got \[.*5\]",
        ),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str, path: str | None) -> None:
    args = {
        "x": torch.zeros(3, 4, 3),
        "y": torch.zeros(3, 4, 2),
        "loss": "mse",
        "lr": 0.1,
        "steps": 1,
        **change,
    }
    kind = TypeError if args["x"].dtype == torch.float64 and path is None else ValueError
    with pytest.raises(kind, match=message):
        metafast.adapt(mlp(), path=path, **args)


def test_float_labels_are_no_labels() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4)
    for path in (None, "torch.func", "loop"):
        with pytest.raises(TypeError, match="y: expected a tensor of dtype int64, got"):
            metafast.adapt(mlp(), x, y, loss="cross_entropy", lr=0.1, steps=1, path=path)


def test_an_adapted_module_names_what_it_cannot_take() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4, 2)
    adapted = metafast.adapt(mlp(), x, y, loss="mse", lr=0.1, steps=1, path="torch.func")
    with pytest.raises(ValueError, match=r"x: expected examples that the module takes; .*\[4, 7\] of"):
        adapted(torch.zeros(3, 4, 7))


def test_bad_modules_and_losses() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4, 2)
    with pytest.raises(
        ValueError, match="module: expected a parameter that requires grad and adapts, got none"
    ):
        metafast.adapt(nn.Tanh(), x, y, loss="mse", lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"loss: expected a function that returns a scalar, got \[4, 2\]"):
        metafast.adapt(mlp(), x, y, loss=lambda out, y: (out - y).square(), lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"y: expected classes in \[0, 2\)"):
        metafast.adapt(mlp(), x, torch.full((3, 4), 2), loss="cross_entropy", lr=0.1, steps=1)


def test_a_layer_that_runs_twice_stays_in_its_module() -> None:
    shared = nn.Linear(3, 3)
    network, weight = nn.Sequential(shared, nn.Tanh(), shared), shared.weight
    x = torch.randn(2, 5, 3)
    adapted = metafast.adapt(network, x, x, loss="mse", lr=0.1, steps=2)
    assert shared.weight is weight
    (expected,) = torch.autograd.grad(F.mse_loss(network(x[0]), x[0]), [weight])
    one = metafast.adapt(network, x, x, loss="mse", lr=0.1, steps=1)
    torch.testing.assert_close(one.params["0.weight"][0], weight - 0.1 * expected)
    assert adapted(x).shape == x.shape
