"""Weights of examples in the inner loop ops: weighted means, and examples that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metafast
from metafast import reference

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
    assert doors == [("maml_loss", "op")]
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
        ValueError, match=r"example_weights: expected shape \[T, S\] = \[3, 4\], got \[3, 2\]"
    ):
        metafast.inner_sgd(params, x, y, example_weights=torch.ones(3, 2, dtype=torch.float64), **options)
    with pytest.raises(TypeError, match=r"example_weights: expected the dtype of params\[0\]"):
        metafast.inner_sgd(params, x, y, example_weights=torch.ones(3, 4), **options)
    with pytest.raises(TypeError, match="example_weights: expected a tensor, got list"):
        metafast.inner_sgd(params, x, y, example_weights=[1.0], **options)
    with pytest.raises(ValueError, match="y: expected"):
        metafast.inner_sgd(params, x, y[:, :2], example_weights=torch.ones(3, 4), **options)


def weighted(tasks: int, loss: str, shapes: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
    """Parameters, data and weights; of the first example of some tasks the weight is 0, of the second the
    label -100, and some weights are negative."""
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    params = [torch.randn(*shape, **double).div(shape[-1] ** 0.5) for shape in shapes]
    data, weights = [], []
    for count in (S, Q):
        labels = torch.randint(0, 2, (tasks, count))
        labels[:, 1] = -100
        data.append(torch.randn(tasks, count, shapes[0][1], **double))
        data.append(labels if loss == "cross_entropy" else torch.randn(tasks, count, 2, **double))
        weights.append(torch.rand(tasks, count, **double) + 0.2)
        weights[-1][:, 2] = -0.1
        weights[-1][::2, 0] = 0
    return {"params": params, "data": data, "weights": weights}


def gradients(
    module: ModuleType, tensors: dict[str, list[Tensor]], like: torch.device, **options: Any
) -> list[Tensor]:
    """The losses of the tasks, and every gradient of them, some of which no gradient reaches."""
    moved = {
        name: [t.to(like).requires_grad_(t.is_floating_point()) for t in of_name]
        for name, of_name in tensors.items()
    }
    (lr, *step_weights), weights = moved.get("rates", [0.05]), moved["weights"]
    losses = module.maml_loss(
        moved["params"],
        *moved["data"],
        lr=lr,
        step_weights=step_weights[0] if step_weights else None,
        support_weights=weights[0],
        query_weights=weights[1],
        reduction="none",
        steps=3,
        activation="tanh",
        **options,
    )
    along = torch.linspace(0, 1, len(losses), dtype=torch.float64, device=like)
    leaves = [t for of_name in moved.values() for t in of_name if t.requires_grad]
    grads = torch.autograd.grad((losses * along).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [t.detach().cpu() for t in (losses, *grads)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("tasks", [2, 3, 40])
def test_every_gradient_in_every_layout(
    tasks: int, momentum: float, loss: str, backend: torch.device
) -> None:
    """Beside the reference; few tasks and many lie in other lanes."""
    tensors = weighted(tasks, loss, ((9, 3), (9,), (2, 9), (2,)))
    tensors["rates"] = [torch.rand(3, 2, dtype=torch.float64) / 10, torch.rand(3, dtype=torch.float64)]
    for first_order in (False, True):
        options = {"loss": loss, "momentum": momentum, "first_order": first_order}
        torch.testing.assert_close(
            gradients(metafast, tensors, backend, **options),
            gradients(reference, tensors, torch.device("cpu"), **options),
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_wide_first_layer(loss: str, backend: torch.device) -> None:
    """In the dual form, which gives no gradient of the inputs; and in the direct form, which does."""
    tensors = weighted(3, loss, ((300, 900), (300,), (2, 300), (2,)))
    for data, given in ((0, tensors["weights"][0]), (2, tensors["weights"][1])):
        for examples in tensors["data"][data : data + 2]:
            examples[given == 0] = 77 if examples.dtype == torch.int64 else torch.nan
    cpu = torch.device("cpu")
    torch.testing.assert_close(
        gradients(metafast, tensors, backend, loss=loss), gradients(reference, tensors, cpu, loss=loss)
    )
    params = [p.to(backend).requires_grad_() for p in tensors["params"]]
    data, weights = (
        [t.to(backend) for t in tensors["data"]],
        [w.to(backend).requires_grad_() for w in tensors["weights"]],
    )
    options = {"loss": loss, "lr": 0.05, "steps": 3, "activation": "tanh"}
    given = dict(zip(("support_weights", "query_weights"), weights, strict=True))
    leaves = [*params, *weights]
    expected = reference.maml_loss(params, *data, **given, **options)
    grads = torch.autograd.grad(expected, leaves)
    found = metafast.maml_loss(params, *data, **given, **options)
    torch.testing.assert_close([found, *torch.autograd.grad(found, leaves)], [expected, *grads])
    value, of_params = metafast.maml_value_and_grad(params, *data, **given, **options)
    torch.testing.assert_close([value, *of_params], [expected, *grads[:4]])


def test_vmap_and_compile() -> None:
    """Each example's own weights, by the kernels."""
    params, data = problem("mse")
    weights = torch.rand(2, T, S, dtype=torch.float64) + 0.1
    options = {"loss": "mse", "lr": 0.1, "steps": 2}

    def adapted(weights: Tensor) -> Tensor:
        return metafast.inner_sgd(params, *data[:2], example_weights=weights, **options)[0]

    expected = torch.stack([adapted(w) for w in weights])
    with metafast.trace_doors() as doors:
        found = torch.vmap(torch.func.grad(lambda w: adapted(w).square().sum()))(weights)
    assert set(doors) == {("inner_sgd", "function")}
    leaves = weights.clone().requires_grad_()
    wanted = torch.autograd.grad(sum(adapted(w).square().sum() for w in leaves), leaves)[0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.vmap(adapted)(weights), expected)
