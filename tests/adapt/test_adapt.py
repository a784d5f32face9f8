"""adapt, on each of its paths, against a plain loop of torch.autograd.grad over tasks and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import (
    LOSSES,
    MODULES,
    QUERIES,
    SHOTS,
    STEPS,
    TASKS,
    make,
    plain,
    with_gradients,
)
from record_ops import RecordOps
from torch import Tensor, nn

import metafast


@pytest.mark.parametrize("path", [None, "torch.func", "loop"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODULES)
def test_adapted_outputs_and_meta_gradients(
    name: str, loss: str, first_order: bool, path: str | None
) -> None:
    module, (x, y, query_x, query_y) = make(name, loss)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = [*module.parameters(), lr, query_x, *([] if first_order else [x])]
    options = {"first_order": first_order, "momentum": 0.6}
    adapted = metafast.adapt(module, x, y, loss=loss, lr=lr, steps=STEPS, path=path, **options)
    rates = [lr] * len(list(module.parameters()))
    expected, _ = plain(module, x, y, query_x, loss=LOSSES[loss], lr=rates, **options)
    known = name in ("mlp", "nested", "conv with batch norm", "embedded")
    of_kind = "fused" if known else "torch.func"
    assert adapted.path == (path or of_kind)
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, loss, leaves),
        with_gradients(expected, query_y, loss, leaves),
    )


@pytest.mark.parametrize("given", ["sequence", "dict", "numbers"])
@pytest.mark.parametrize("name", ["mlp", "conv with batch norm"])
def test_a_rate_for_each_parameter(name: str, given: str) -> None:
    module, (x, y, query_x, query_y) = make(name, "mse")
    names = [n for n, _ in module.named_parameters()]
    rates: list[Any] = [(0.1 * torch.rand_like(p)).requires_grad_() for p in module.parameters()]
    if given == "numbers":
        rates = [0.01 * (i + 1) for i in range(len(rates))]
    lr = dict(zip(reversed(names), reversed(rates), strict=True)) if given == "dict" else rates
    leaves = [*module.parameters(), *(r for r in rates if isinstance(r, Tensor))]
    adapted = metafast.adapt(module, x, y, loss="mse", lr=lr, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=rates)
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


def test_a_rate_for_each_step_and_layer() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    lr = torch.full((STEPS, 3), 0.1, dtype=torch.float64)
    one, other = (
        metafast.adapt(module, x, y, loss="mse", lr=rate, steps=STEPS)(query_x) for rate in (lr, 0.1)
    )
    torch.testing.assert_close(one, other)


def test_weight_decay_and_nesterov() -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")
    options = {"momentum": 0.7, "weight_decay": 0.2, "nesterov": True}
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, **options)
    assert adapted.path == "torch.func"
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6, **options)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


@pytest.mark.parametrize("path", [None, "torch.func", "loop"])
@pytest.mark.parametrize("how", ["a name and a prefix", "frozen"])
def test_only_the_head_adapts(how: str, path: str | None) -> None:
    module, (x, y, query_x, query_y) = make("embedded", "cross_entropy")
    names = ["3.weight", "3.bias", "5.weight", "5.bias"]
    params = ["3.weight", "3.bias", "5"] if how == "a name and a prefix" else None
    if params is None:
        module[0].requires_grad_(False)
    adapted = metafast.adapt(
        module, x, y, loss="cross_entropy", lr=0.3, steps=STEPS, params=params, path=path
    )
    assert adapted.path == (path or "fused")
    assert list(adapted.params) == names
    expected, _ = plain(module, x, y, query_x, loss=F.cross_entropy, lr=[0.3] * 4, names=names)
    leaves = [*(p for p in module.parameters() if p.requires_grad), x, query_x]  # also of the body
    found, wanted = (
        with_gradients(out, query_y, "cross_entropy", leaves) for out in (adapted(query_x), expected)
    )
    torch.testing.assert_close(found, wanted)


def test_batch_norm_statistics() -> None:
    module, (x, y, query_x, _) = make("conv with batch norm", "mse")
    before = {name: b.clone() for name, b in module.named_buffers()}
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    _, buffers = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6)
    for name, found in adapted.buffers.items():
        torch.testing.assert_close(found, torch.stack([b[name] for b in buffers]))
    assert adapted.buffers["1.num_batches_tracked"].tolist() == [STEPS] * TASKS
    after = {name: b.clone() for name, b in adapted.buffers.items()}
    module.eval()
    out = adapted(query_x)  # by each task's own statistics
    module.train()
    adapted(query_x)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    assert all(torch.equal(b, after[name]) for name, b in adapted.buffers.items())
    module.eval()
    parts = [
        torch.func.functional_call(
            module, {n: p[t] for n, p in {**adapted.params, **adapted.buffers}.items()}, (query_x[t],)
        )
        for t in range(TASKS)
    ]
    torch.testing.assert_close(out, torch.stack(parts))


def test_dropout_is_drawn_for_each_task() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    x = torch.randn(1, SHOTS, 3).expand(TASKS, -1, -1)
    adapted = metafast.adapt(module, x, torch.zeros(TASKS, SHOTS, 2), loss="mse", lr=0.1, steps=1)
    assert not torch.equal(adapted.params["0.weight"][0], adapted.params["0.weight"][1])
    module.eval()
    adapted = metafast.adapt(module, x, torch.zeros(TASKS, SHOTS, 2), loss="mse", lr=0.1, steps=1)
    torch.testing.assert_close(adapted.params["0.weight"][0], adapted.params["0.weight"][1])


def test_a_function_as_loss() -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")

    def huber(out: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(out, y, delta=0.3)

    adapted = metafast.adapt(module, x, y, loss=huber, lr=0.1, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=huber, lr=[0.1] * 6)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


@pytest.mark.parametrize("path", [None, "torch.func", "loop"])
def test_labels_that_are_left_out(path: str | None) -> None:
    module, (x, y, query_x, _) = make("mlp", "cross_entropy")
    y[0] = -100
    y[1, 2:] = -100
    out = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.5, steps=STEPS, path=path)(query_x)
    torch.testing.assert_close(out[0], module(query_x[0]))
    alone = metafast.adapt(module, x[1:2, :2], y[1:2, :2], loss="cross_entropy", lr=0.5, steps=STEPS)
    torch.testing.assert_close(out[1:2], alone(query_x[1:2]))


@pytest.mark.parametrize("name", ["mlp", "conv with batch norm", "normed", "LSTM", "attention"])
def test_higher_derivatives(name: str) -> None:
    """Against finite differences: the third derivatives of torch's own norms are wrong."""
    module, (x, y, query_x, _) = make(name, "mse")
    first = next(module.parameters())
    direction, step = torch.randn_like(first), 1e-5

    def meta_gradient(create_graph: bool = False) -> Tensor:
        out = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path="torch.func")(query_x)
        return torch.autograd.grad(out.square().sum(), first, create_graph=create_graph)[0]

    (exact,) = torch.autograd.grad((meta_gradient(create_graph=True) * direction).sum(), first)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            first += sign * step * direction
        ends.append(meta_gradient())
        with torch.no_grad():
            first -= sign * step * direction
    torch.testing.assert_close(exact, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_fused_is_differentiable_once() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    out = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path="fused")(query_x)
    (grad,) = torch.autograd.grad(out.square().sum(), module[0].weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("path", [None, "torch.func", "loop"])
def test_no_steps(path: str | None) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=0, path=path)
    torch.testing.assert_close(adapted(query_x), torch.stack([module(task) for task in query_x]))


def test_no_tasks() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    adapted = metafast.adapt(module, x[:0], y[:0], loss="mse", lr=0.1, steps=1)
    assert adapted(query_x[:0]).shape == (0, QUERIES, 2)
    with pytest.raises(ValueError, match="x: expected a task or more, got none"):
        metafast.adapt(module, x[:0], y[:0], loss="mse", lr=0.1, steps=1, path="torch.func")


@pytest.mark.parametrize(
    ("name", "path"),
    [("mlp", "fused"), ("embedded", None), ("mlp", "torch.func"), ("conv with batch norm", None)],
)
def test_compile(name: str, path: str | None) -> None:
    torch.compiler.reset()
    module, (x, y, query_x, _) = make(name, "mse")

    def outputs(x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path=path)(query_x)

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    weight = module[0].weight
    found, expected = (
        [out, *torch.autograd.grad(out.square().sum(), weight)]
        for out in (function(x, y, query_x) for function in (compiled, outputs))
    )
    torch.testing.assert_close(found, expected)


def test_inside_a_transform() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")

    def total(x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)(query_x).square().sum()

    torch.testing.assert_close(torch.func.grad(total)(x), torch.autograd.grad(total(x), x)[0])


@pytest.mark.parametrize(("path", "tasks"), [("torch.func", TASKS), ("loop", 1)])
def test_convolutions_of_all_tasks_are_one_call(path: str, tasks: int) -> None:
    """Of the kernels; not of torch's convolutions with a group for each task."""
    module, (x, y, query_x, _) = make("normed", "mse")
    with RecordOps() as record:
        adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1, path=path)
        adapted(query_x).sum().backward()
    ops = torch.ops.metafast.task_conv2d_maps.default, torch.ops.metafast.task_conv2d_weight.default
    assert [len(record.calls[op][0]) for op in ops] == [tasks, tasks]


@pytest.mark.parametrize("path", ["fused", "torch.func"])
def test_autocast(path: str) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse", torch.float32)
    expected = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path=path)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path=path)
        assert adapted(query_x).dtype == (
            torch.bfloat16 if path == "fused" else torch.float32
        )  # vmap holds it off
    for name, param in adapted.params.items():
        assert param.dtype == torch.float32
        # The fused path adapts in float32 whether or not autocast is on.
        tolerance = 0.0 if path == "fused" else 2e-2
        torch.testing.assert_close(param, expected.params[name], rtol=tolerance, atol=tolerance)


def test_half_precision_is_refused() -> None:
    module, (x, y, *_) = make("mlp", "mse", torch.bfloat16)
    message = "module: expected parameters of dtype float32 or float64, got torch.bfloat16 in 0.weight"
    with pytest.raises(TypeError, match=message):
        metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)


def test_compile_with_a_graph_break() -> None:
    """The default torch.compile breaks at a GRU, and carries the Adapted over."""
    torch.compiler.reset()
    module, (x, y, query_x, _) = make("GRU", "mse")

    def outputs(x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1)
        torch._dynamo.graph_break()
        return adapted(query_x)

    found = torch.compile(outputs, backend="aot_eager")(x, y, query_x)
    torch.testing.assert_close(found, outputs(x, y, query_x))


def test_adapted_is_equal_to_itself_alone() -> None:
    module, (x, y, *_) = make("mlp", "mse")
    one, other = (metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1) for _ in range(2))
    assert one in {one, other}
    assert one != other
