"""Weights of examples in the inner loop ops: weighted means, and examples that are left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metafast

T, S, Q = 3, 4, 5
LOSSES = ["mse", "cross_entropy"]


def problem(loss: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    params = [
        torch.randn(*s, dtype=torch.float64).div(2).requires_grad_() for s in ((4, 3), (4,), (2, 4), (2,))
    ]
    data: list[Tensor] = []
    for count in (S, Q):
        data.append(torch.randn(T, count, 3, dtype=torch.float64))
        labels = torch.randint(0, 2, (T, count))
        data.append(labels if loss == "cross_entropy" else torch.randn(T, count, 2, dtype=torch.float64))
    return params, data


@pytest.mark.parametrize("loss", LOSSES)
def test_weighted_means(loss: str) -> None:
    """Beside plain autograd for each task, with the gradients of the weights."""
    params, (x, y, query_x, query_y) = problem(loss)
    weights = [torch.rand(T, n, dtype=torch.float64).requires_grad_() for n in (S, Q)]

    def weighed(theta: list[Tensor], x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        out = F.linear(F.relu(F.linear(x, *theta[:2])), *theta[2:])
        each = (out - y).square().mean(1) if loss == "mse" else F.cross_entropy(out, y, reduction="none")
        return (w * each).sum() / w.sum()

    expected = []
    for t in range(T):
        theta = params
        for _ in range(2):
            grads = torch.autograd.grad(weighed(theta, x[t], y[t], weights[0][t]), theta, create_graph=True)
            theta = [p - 0.1 * g for p, g in zip(theta, grads, strict=True)]
        expected.append(weighed(theta, query_x[t], query_y[t], weights[1][t]))
    with metafast.trace_doors() as doors:
        found = metafast.maml_loss(
            params,
            *(x, y, query_x, query_y),
            loss=loss,
            lr=0.1,
            steps=2,
            support_weights=weights[0],
            query_weights=weights[1],
            reduction="none",
        )
    assert ("maml_loss", "reference") in doors
    leaves = [*params, *weights]
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(sum(expected), leaves)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_ones_are_no_weights(loss: str) -> None:
    params, (x, y, *_) = problem(loss)
    options = {"loss": loss, "lr": 0.1, "steps": 2, "momentum": 0.5}
    ones = torch.ones(T, S, dtype=torch.float64)
    torch.testing.assert_close(
        metafast.inner_sgd(params, x, y, example_weights=ones, **options),
        metafast.inner_sgd(params, x, y, **options),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_weight_zero_leaves_out_whatever_an_example_holds(loss: str) -> None:
    params, (x, y, *_) = problem(loss)
    x[0, 1], x[1] = torch.nan, torch.inf
    y[0, 1] = -7 if loss == "cross_entropy" else torch.nan
    weights = torch.ones(T, S, dtype=torch.float64)
    weights[0, 1], weights[1] = 0, 0
    options = {"loss": loss, "lr": 0.1, "steps": 2}
    found = metafast.inner_sgd(params, x, y, example_weights=weights, **options)
    kept = [0, 2, 3]
    alone = metafast.inner_sgd(params, x[:1, kept], y[:1, kept], **options)
    for param, one, other in zip(params, found, alone, strict=True):
        torch.testing.assert_close(one[0], other[0])
        torch.testing.assert_close(one[1], param)  # a task without examples is not adapted
    grads = torch.autograd.grad(sum(p[0].square().sum() for p in found), params)
    wanted = torch.autograd.grad(sum(p[0].square().sum() for p in alone), params)
    torch.testing.assert_close(grads, wanted)


def test_bad_weights() -> None:
    params, (x, y, *_) = problem("mse")
    options = {"loss": "mse", "lr": 0.1, "steps": 1}
    with pytest.raises(
        ValueError, match=r"example_weights: expected floats of shape \[T, S\] = \[3, 4\], got \[3, 2\]"
    ):
        metafast.inner_sgd(params, x, y, example_weights=torch.ones(3, 2), **options)
    with pytest.raises(ValueError, match="y: expected"):
        metafast.inner_sgd(params, x, y[:, :2], example_weights=torch.ones(3, 4), **options)
