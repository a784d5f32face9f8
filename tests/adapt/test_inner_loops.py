"""Inner loops beyond plain SGD, weights of examples and trees of tensors, beside plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import LOSSES, SHOTS, STEPS, TASKS, conv, make, mlp, with_gradients
from torch import Tensor, nn

import metafast

PATHS = ["torch.func", "loop"]


def by_hand(
    module: nn.Module,
    loss_of: Callable[[Callable[[Tensor], Tensor], dict[str, Tensor], int, int], Tensor],
    query_x: Tensor,
    *,
    step_of: Callable[[list[Tensor], int], list[Tensor]] = lambda grads, step: [0.1 * g for g in grads],
    steps: int = STEPS,
) -> Tensor:
    """The outputs of tasks: loss_of(the task's module, theta, step, task), a move of each parameter."""
    outputs = []
    for t in range(len(query_x)):
        theta = dict(module.named_parameters())
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        for k in range(steps):

            def call(*args: Any, theta: Any = theta, buffers: Any = buffers, **kwargs: Any) -> Any:
                return torch.func.functional_call(module, {**theta, **buffers}, args, kwargs)

            grads = torch.autograd.grad(loss_of(call, theta, k, t), list(theta.values()), create_graph=True)
            theta = {n: p - m for (n, p), m in zip(theta.items(), step_of(list(grads), k), strict=True)}
        outputs.append(torch.func.functional_call(module, {**theta, **buffers}, (query_x[t],)))
    return torch.stack(outputs)


def compare(adapted: Tensor, expected: Tensor, query_y: Tensor, loss: str, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(
        with_gradients(adapted, query_y, loss, leaves), with_gradients(expected, query_y, loss, leaves)
    )


@pytest.mark.parametrize(
    ("name", "path"), [("mlp", "fused"), *((n, p) for n in ("mlp", "conv with batch norm") for p in PATHS)]
)
def test_a_rate_for_each_step_and_layer(name: str, path: str) -> None:
    module, (x, y, query_x, query_y) = make(name, "mse")
    layers = list(dict.fromkeys(n.rpartition(".")[0] for n, _ in module.named_parameters()))
    lr = (0.1 * torch.rand(STEPS, len(layers), dtype=torch.float64)).requires_grad_()
    adapted = metafast.adapt(module, x, y, loss="mse", lr=lr, steps=STEPS, path=path)

    def step_of(grads: list[Tensor], k: int) -> list[Tensor]:
        names = [n.rpartition(".")[0] for n, _ in module.named_parameters()]
        return [lr[k, layers.index(name)] * g for name, g in zip(names, grads, strict=True)]

    expected = by_hand(
        module, lambda call, theta, k, t: F.mse_loss(call(x[t]), y[t]), query_x, step_of=step_of
    )
    compare(adapted(query_x), expected, query_y, "mse", [*module.parameters(), lr])
    with pytest.raises(
        ValueError, match=r"lr: .* \[K, L\] = \[2, \d\] of each step and layer .*, got shape \[2, 1\]"
    ):
        metafast.adapt(module, x, y, loss="mse", lr=lr[:, :1], steps=STEPS, path=path)


@pytest.mark.parametrize("path", ["fused", *PATHS])
def test_a_batch_for_each_step(path: str) -> None:
    module, (_, _, query_x, query_y) = make("mlp", "mse")
    x = torch.randn(STEPS, TASKS, SHOTS, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(STEPS, TASKS, SHOTS, 2, dtype=torch.float64, requires_grad=True)
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, per_step=True, path=path)
    expected = by_hand(module, lambda call, theta, k, t: F.mse_loss(call(x[k, t]), y[k, t]), query_x)
    compare(adapted(query_x), expected, query_y, "mse", [*module.parameters(), x, y])
    with pytest.raises(
        ValueError, match=r"x: expected shape \[K, T, S, ...\] with K = 3, got \[2, 3, 4, 3\]"
    ):
        metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=3, per_step=True, path=path)
    none = metafast.adapt(module, x[:0], y[:0], loss="mse", lr=0.1, steps=0, per_step=True, path=path)
    torch.testing.assert_close(none(query_x), module(query_x))


@pytest.mark.parametrize("rates", ["layers", "elements"])
@pytest.mark.parametrize("behind", ["nothing", "a body"])
def test_batches_of_steps_are_fused(behind: str, rates: str) -> None:
    """With weights of examples, behind a body that does not adapt, and with all kinds of rates."""
    module, (_, _, query_x, query_y) = make("mlp", "mse")
    names = None
    if behind == "a body":
        module[0].requires_grad_(False)
        names = [name for name, _ in module.named_parameters()][2:]
    adapting = [p for p in module.parameters() if p.requires_grad]
    x = torch.randn(STEPS, TASKS, SHOTS, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(STEPS, TASKS, SHOTS, 2, dtype=torch.float64)
    weights = torch.rand(STEPS, TASKS, SHOTS, dtype=torch.float64, requires_grad=True)
    lr = [torch.rand_like(p).requires_grad_() for p in adapting]
    if rates == "layers":
        lr = torch.rand(STEPS, len(adapting) // 2, dtype=torch.float64, requires_grad=True)
    leaves = [*adapting, x, weights, *(lr if isinstance(lr, list) else [lr])]
    options = {"loss": "mse", "lr": lr, "steps": STEPS, "params": names, "example_weights": weights}
    found, expected = (
        with_gradients(
            metafast.adapt(module, x, y, per_step=True, path=path, **options)(query_x), query_y, "mse", leaves
        )
        for path in ("fused", "loop")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_clipped_gradients(path: str) -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")
    limit = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)  # some are below it, some are not
    norms = []

    def step_of(grads: list[Tensor], k: int) -> list[Tensor]:
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        return [0.1 * g * (limit / (norms[-1] + 1e-6)).clamp(max=1) for g in grads]

    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, max_norm=limit, path=path)
    loss_of = lambda call, theta, k, t: F.mse_loss(call(x[t]), y[t])  # noqa: E731
    expected = by_hand(module, loss_of, query_x, step_of=step_of)
    compare(adapted(query_x), expected, query_y, "mse", [*module.parameters(), limit])
    assert min(norms) < limit < max(norms)


@pytest.mark.parametrize("path", PATHS)
def test_a_proximal_term(path: str) -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def proximal(theta: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
        return strength * sum((theta[n] - start[n]).square().sum() for n in theta)

    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, penalty=proximal, path=path)
    expected = by_hand(
        module,
        lambda call, theta, k, t: (
            F.mse_loss(call(x[t]), y[t]) + proximal(theta, dict(module.named_parameters()))
        ),
        query_x,
    )
    compare(adapted(query_x), expected, query_y, "mse", [*module.parameters(), strength])


@pytest.mark.parametrize(("name", "path"), [("mlp", "fused"), *(("conv with batch norm", p) for p in PATHS)])
def test_going_on_from_an_adapted(name: str, path: str) -> None:
    module, (x, y, query_x, query_y) = make(name, "mse")
    options = {"loss": "mse", "lr": 0.1, "path": path}
    halfway = metafast.adapt(module, x, y, steps=1, **options)
    ends = [
        metafast.adapt(halfway, x, y, steps=2, **options),
        metafast.adapt(module, x, y, steps=3, **options),
    ]
    assert ends[0].path == path
    torch.testing.assert_close(ends[0].buffers, ends[1].buffers)
    compare(ends[0](query_x), ends[1](query_x), query_y, "mse", list(module.parameters()))
    with pytest.raises(ValueError, match="params: expected None for an Adapted"):
        metafast.adapt(halfway, x, y, steps=2, params="0", **options)


@pytest.mark.parametrize(("name", "path"), [("mlp", "fused"), *(("conv with batch norm", p) for p in PATHS)])
def test_who_looks_at_the_parameters_first_does_not_matter(name: str, path: str) -> None:
    module, (x, y, _, _) = make(name, "mse")
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1, path=path)
    with torch.no_grad():
        adapted.params  # noqa: B018
        metafast.adapt(adapted, x, y, loss="mse", lr=0.1, steps=1, path=path)
    total = sum(param.square().sum() for param in adapted.params.values())
    gradients = torch.autograd.grad(total, list(module.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# --- weights of examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["fused", *PATHS])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_examples(loss: str, path: str) -> None:
    module, (x, y, query_x, query_y) = make("mlp", loss)
    weights = torch.rand(TASKS, SHOTS, dtype=torch.float64).requires_grad_()
    options = {"loss": loss, "lr": 0.1, "steps": STEPS, "path": path}
    adapted = metafast.adapt(module, x, y, example_weights=weights, **options)

    def loss_of(call: Any, theta: Any, k: int, t: int) -> Tensor:
        each = LOSSES[loss](call(x[t]), y[t], reduction="none")
        each = each.mean(1) if loss == "mse" else each
        return (weights[t] * each).sum() / weights[t].sum()

    expected = by_hand(module, loss_of, query_x)
    compare(adapted(query_x), expected, query_y, loss, [*module.parameters(), weights, x])


@pytest.mark.parametrize("path", ["fused", *PATHS])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_example_of_weight_zero_is_left_out(loss: str, path: str) -> None:
    module, (x, y, query_x, _) = make("mlp", loss)
    with torch.no_grad():
        x[0, 1], x[1] = torch.nan, torch.inf
        y[0, 1] = -7 if loss == "cross_entropy" else torch.nan
    weights = torch.ones(TASKS, SHOTS, dtype=torch.float64)
    weights[0, 1], weights[1] = 0, 0
    weights.requires_grad_()
    options = {"loss": loss, "lr": 0.1, "steps": STEPS, "path": path}
    out = metafast.adapt(module, x, y, example_weights=weights, **options)(query_x)
    kept = [0, 2, 3]
    alone = metafast.adapt(module, x[:1, kept], y[:1, kept], **options)(query_x[:1])
    leaves = list(module.parameters())
    (of_weights,) = torch.autograd.grad(out.square().sum(), weights, retain_graph=True)
    assert of_weights[weights == 0].eq(0).all()
    for task, expected in ((0, alone[0]), (1, module(query_x[1]))):
        found = torch.autograd.grad(out[task].square().sum(), leaves, retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), leaves, retain_graph=True)
        torch.testing.assert_close([out[task], *found], [expected, *wanted])


def test_bad_weights() -> None:
    module, (x, y, *_) = make("mlp", "mse")
    weights = torch.ones(TASKS, SHOTS)
    options = {"lr": 0.1, "steps": 1}
    with pytest.raises(
        ValueError, match=r"example_weights: expected floats of shape \[T, S\] = \[3, 4\], got \[3, 5\]"
    ):
        metafast.adapt(module, x, y, loss="mse", example_weights=torch.ones(3, 5), **options)
    with pytest.raises(ValueError, match=r"example_weights: expected floats .* got \[3, 4\] of torch.int64"):
        metafast.adapt(module, x, y, loss="mse", example_weights=weights.long(), **options)
    with pytest.raises(ValueError, match="example_weights: expected loss 'mse' or 'cross_entropy'"):
        metafast.adapt(module, x, y, loss=F.mse_loss, example_weights=weights, **options)


@pytest.mark.parametrize("path", PATHS)
def test_no_examples(path: str) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    out = metafast.adapt(module, x[:, :0], y[:, :0], loss="mse", lr=0.1, steps=STEPS, path=path)(query_x)
    torch.testing.assert_close(out, torch.stack([module(task) for task in query_x]))


# --- trees of tensors -----------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, other: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        out = self.layers(x + other)
        return {"mean": out, "log_scale": (out if scale is None else out * scale).sum(1)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", ["tuple", "dict"])
def test_trees_of_tensors(given: str, path: str) -> None:
    _, (x, y, query_x, _) = make("mlp", "mse")
    module = Two().double()
    scale = torch.rand(TASKS, SHOTS, 2, dtype=torch.float64)
    inputs = (x, 2 * x, scale) if given == "tuple" else {"other": 2 * x, "x": x, "scale": scale}
    targets = {"action": y, "advantage": [y.sum(2)]}

    def loss(out: dict[str, Tensor], y: dict[str, Any]) -> Tensor:
        return F.mse_loss(out["mean"], y["action"]) + F.mse_loss(out["log_scale"], y["advantage"][0])

    adapted = metafast.adapt(module, inputs, targets, loss=loss, lr=0.1, steps=STEPS, path=path)
    out = adapted((query_x, query_x))
    assert out["mean"].shape == (TASKS, 5, 2)

    def loss_of(call: Any, theta: Any, k: int, t: int) -> Tensor:
        return loss(call(x[t], 2 * x[t], scale[t]), {"action": y[t], "advantage": [y[t].sum(1)]})

    expected = by_hand(Wrapped(module), lambda call, *a: loss_of(lambda *x: call(x), *a), query_x)
    torch.testing.assert_close(out["mean"], expected)


class Wrapped(nn.Module):
    """The module of a tuple, or of its first alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return self.module(*x) if isinstance(x, tuple) else self.module(x, x)["mean"]


def test_what_is_no_tensor_is_named() -> None:
    module, (x, y, *_) = make("mlp", "mse")
    options = {"loss": "mse", "lr": 0.1, "steps": 1}
    with pytest.raises(
        TypeError, match=r"x: expected a tensor, or a tuple, list or dict of tensors, got ndarray"
    ):
        metafast.adapt(module, x.detach().numpy(), y, **options)
    with pytest.raises(TypeError, match=r"x: expected .*, got float in it"):
        metafast.adapt(module, [[1.0]], y, **options)
    with pytest.raises(TypeError, match="y: expected a tensor for loss='mse', got dict"):
        metafast.adapt(module, x, {"y": y}, **options)


# --- the dimension of tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, *PATHS])
def test_a_forgotten_dimension_of_tasks(path: str | None) -> None:
    p = torch.randn(10, 1)
    images, labels = torch.randn(25, 1, 6, 6), torch.zeros(25, dtype=torch.int64)
    sine = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = sine

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * 1

    options = {"lr": 0.1, "steps": 1, "path": path}
    for module in (sine, Own()):
        with pytest.raises(ValueError, match=r"x: expected shape \[T, S, .*\]"):
            metafast.adapt(module, p, p.sin(), loss="mse", **options)
    with pytest.raises(
        ValueError,
        match=r"x: expected shape \[T, S, (C, H, W\], for layer '0'|.* gets \[T, S, C, H, W\])",
    ):
        metafast.adapt(conv(), images, labels.unsqueeze(1), loss="cross_entropy", **options)
    with pytest.raises(ValueError, match=r"y: expected shape \[T, S, ...\] with T = 25, got \[25\]"):
        metafast.adapt(conv(), images, labels, loss="cross_entropy", **options)
    adapted = metafast.adapt(sine, p.unsqueeze(0), p.sin().unsqueeze(0), loss="mse", **options)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, Q, ...\] with T = 1, got \[10, 1\]"):
        adapted(p)
