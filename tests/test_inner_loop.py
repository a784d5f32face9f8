"""The inner loop ops against the reference: values, gradients, options, bad input."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from record_ops import RecordOps
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import metafast
from metafast import reference

# Relative to the largest element of the tensor, against the float64 reference on the same inputs. The
# gradient of a scalar is a sum over tasks of terms of both signs: its rounding is relative to the largest
# gradient of all.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    tasks: int = 3
    widths: tuple[int, ...] = (3, 7, 5, 2)
    support: int = 5
    query: int = 4
    steps: int = 3
    loss: str = "mse"
    lr: str = "scalar"  # or "step and layer", "element", "constant"
    per_task: bool = False
    activation: str = "tanh"
    momentum: float = 0.0
    first_order: bool = False
    step_weights: tuple[float, ...] | None = None
    reduction: str = "mean"


@dataclass
class Problem:
    """The tensors of a case; those that can have a gradient have one."""

    params: list[Tensor]
    lr: Tensor | list[Tensor]
    data: list[Tensor]  # support x, support y, query x, query y
    options: dict
    query_options: dict

    def leaves(self, *, query: bool) -> list[Tensor]:
        lr = self.lr if isinstance(self.lr, list) else [self.lr]
        tensors = [*self.params, *lr, *self.data[: 4 if query else 2]]
        return [tensor for tensor in tensors if tensor.requires_grad]


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """The same numbers for both dtypes: float64 ones are rounded to float32 first."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(*shape, generator=generator) * scale
        return numbers.to(device, dtype).requires_grad_()

    lead = (case.tasks,) if case.per_task else ()
    params = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        params += [leaf(*lead, outputs, inputs, scale=inputs**-0.5), leaf(*lead, outputs, scale=0.1)]
    if case.lr in ("scalar", "constant"):
        lr = torch.tensor(0.05).to(device, dtype).requires_grad_(case.lr == "scalar")
    elif case.lr == "step and layer":
        lr = leaf(case.steps, len(case.widths) - 1, scale=0.05)
    else:
        lr = [leaf(*p.shape[len(lead) :], scale=0.05) for p in params]
    data = []
    for count in (case.support, case.query):
        data.append(leaf(case.tasks, count, case.widths[0]))
        if case.loss == "mse":
            data.append(leaf(case.tasks, count, case.widths[-1]))
        else:
            labels = torch.randint(0, case.widths[-1], (case.tasks, count), generator=generator)
            labels[::2, -1] = -100
            data.append(labels.to(device))
    weights = None if case.step_weights is None else torch.tensor(case.step_weights).to(device, dtype)
    options = {
        "loss": case.loss,
        "steps": case.steps,
        "activation": case.activation,
        "momentum": case.momentum,
        "first_order": case.first_order,
    }
    return Problem(params, lr, data, options, {"step_weights": weights, "reduction": case.reduction})


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    scales = [other.abs().max().item() if other.numel() else 0.0 for other in expected]
    for one, other, own_scale in zip(actual, expected, scales, strict=True):
        assert one.dtype == dtype
        scale = max(scales) if other.dim() == 0 else own_scale
        atol = TOLERANCE[dtype] * max(scale, 1e-3)
        torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=atol)


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the outputs, each weighed by its own pattern of numbers."""
    total = sum(
        (
            out.double()
            * torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out.device)
        ).sum()
        for out in outputs
    )
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


CASES = [
    Case(widths=(1, 40, 40, 1), support=10, query=10, steps=5),
    Case(tasks=20, widths=(1, 40, 40, 1), support=10, query=10, steps=5),
    Case(tasks=20, widths=(1, 40, 40, 1), support=10, query=10, steps=5, first_order=True),
    Case(activation="relu", lr="step and layer", momentum=0.7),
    Case(tasks=37, activation="relu", lr="step and layer", momentum=0.7, reduction="none"),
    Case(lr="element", momentum=0.7, step_weights=(0.2, 0.3, 0.5)),
    Case(tasks=17, lr="element", step_weights=(0.2, 0.0, 0.8), reduction="none"),
    Case(per_task=True, lr="element", reduction="none"),
    Case(tasks=33, per_task=True, lr="step and layer", momentum=0.5),
    Case(tasks=18, loss="cross_entropy", lr="step and layer", per_task=True),
    Case(loss="cross_entropy", activation="relu", support=19, query=33, reduction="none"),
    Case(tasks=20, loss="cross_entropy", widths=(20, 33, 17, 6), momentum=0.9),
    Case(tasks=18, first_order=True, lr="element", momentum=0.3, step_weights=(1.0, 0.5, 0.25)),
    Case(first_order=True, momentum=0.3, step_weights=(1.0, 0.5, 0.25), loss="cross_entropy"),
    Case(tasks=20, first_order=True, lr="constant", momentum=0.3, step_weights=(1.0, 0.5, 0.25)),
    Case(first_order=True, lr="constant", per_task=True, reduction="none"),
    Case(tasks=17, lr="constant", activation="relu"),
    Case(tasks=16, widths=(4, 3), activation="none", loss="cross_entropy", steps=2),
    Case(widths=(2, 3, 4, 5, 6, 5, 4, 3, 2), steps=2, lr="step and layer"),
    Case(tasks=20, widths=(2, 3, 4, 5, 6, 5, 4, 3, 2), steps=2, activation="relu"),
    Case(widths=(1, 1, 1), support=1, query=1, activation="none"),
    Case(steps=0, reduction="none"),
    Case(tasks=20, steps=0),
    Case(tasks=13, widths=(3, 300, 300, 2), steps=2),  # too large for many tasks at once
    # For a GPU's blocks of 256 threads, for its global memory, and more tasks than it takes at once.
    Case(widths=(2, 60, 60, 1), support=3, steps=2, momentum=0.5, lr="step and layer"),
    Case(tasks=2, widths=(30, 150, 150, 70), support=18, steps=2, loss="cross_entropy", lr="element"),
    Case(tasks=4300, widths=(1, 2, 1), support=2, query=1, steps=1, lr="element"),
]
# The CPU has other lanes for an even number of examples, or many (csrc/inner_loop/lanes.h).
CASES += [
    replace(case, support=8 + i % 2) for i, case in enumerate(CASES) if case.support == 5 and case.tasks > 13
]
CASES.append(Case(tasks=9, support=2, query=3, per_task=True, momentum=0.5, step_weights=(0.2, 0.0, 0.8)))
LANES = [(3, 5), (20, 5), (20, 4)]  # tasks and examples: of each layout of small networks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_maml_loss_and_its_gradients(case: Case, dtype: torch.dtype, backend: torch.device) -> None:
    exact, problem = make(case, torch.float64), make(case, dtype, device=backend)
    expected = reference.maml_loss(
        exact.params, *exact.data, lr=exact.lr, **exact.options, **exact.query_options
    )
    actual = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, **problem.query_options
    )
    assert_near([actual], [expected], dtype)
    assert_near(
        gradients([actual], problem.leaves(query=True)),
        gradients([expected], exact.leaves(query=True)),
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.reduction == "mean"], ids=str)
def test_inner_sgd_and_its_gradients(case: Case, dtype: torch.dtype, backend: torch.device) -> None:
    exact, problem = make(case, torch.float64), make(case, dtype, device=backend)
    expected = reference.inner_sgd(exact.params, *exact.data[:2], lr=exact.lr, **exact.options)
    actual = metafast.inner_sgd(problem.params, *problem.data[:2], lr=problem.lr, **problem.options)
    assert_near(actual, expected, dtype)
    assert_near(
        gradients(actual, problem.leaves(query=False)), gradients(expected, exact.leaves(query=False)), dtype
    )


def test_reference_is_sgd_on_one_task_after_the_other() -> None:
    problem = make(Case(loss="cross_entropy", lr="scalar", momentum=0.7), torch.float64)
    support_x, support_y, query_x, query_y = problem.data

    def forward(params: Sequence[Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, params[0], params[1]))
        return F.linear(torch.tanh(F.linear(hidden, params[2], params[3])), params[4], params[5])

    losses = []
    for task in range(3):
        params = [p.detach().clone().requires_grad_() for p in problem.params]
        optimizer = torch.optim.SGD(params, lr=problem.lr.item(), momentum=0.7)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(forward(params, support_x[task].detach()), support_y[task]).backward()
            optimizer.step()
        losses.append(F.cross_entropy(forward(params, query_x[task].detach()), query_y[task]))
    found = reference.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    torch.testing.assert_close(found, torch.stack(losses))


@pytest.mark.parametrize(("tasks", "support"), [(3, 5), (37, 5), (300, 5), (300, 4)])
def test_same_bits_with_any_number_of_threads(tasks: int, support: int) -> None:
    problem = make(Case(tasks=tasks, support=support, activation="relu"), torch.float32)

    def bits() -> list[Tensor]:
        loss = metafast.maml_loss(problem.params, *problem.data, lr=problem.lr, **problem.options)
        return [loss, *torch.autograd.grad(loss, problem.leaves(query=True))]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bits())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("margin", [3.0, 10.0, 15.0])
def test_well_classified_examples_keep_their_digits(margin: float, backend: torch.device) -> None:
    """Of a loss near 0 a difference of logits leaves nothing; torch's own is off by 17 % here."""
    x, y = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0]], device=backend)

    def loss_and_gradient(of: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        like = {"dtype": dtype, "device": backend}
        weight = torch.tensor([[margin, 0.0], [0.0, 0.0]], **like).requires_grad_()
        loss = of(
            [weight, torch.zeros(2, **like)], x.to(**like), y, x.to(**like), y,
            loss="cross_entropy", lr=0.1, steps=1,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss, weight)

    exact = loss_and_gradient(reference.maml_loss, torch.float64)
    for result, expected in zip(loss_and_gradient(metafast.maml_loss, torch.float32), exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("tasks", "support"), LANES)
def test_nan_stays_in_its_task(tasks: int, support: int, value: float, backend: torch.device) -> None:
    problem = make(Case(tasks=tasks, support=support, per_task=True), torch.float32, device=backend)
    clean = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    with torch.no_grad():
        problem.data[0][1, 2, 0] = value
    loss = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    others = torch.arange(tasks, device=backend) != 1
    assert loss[1].isnan()
    assert torch.equal(loss[others], clean[others])
    grads = torch.autograd.grad(loss.sum(), problem.params)
    assert all(g[others].isfinite().all() for g in grads)
    assert any(g[1].isnan().any() for g in grads)
    adapted = metafast.inner_sgd(problem.params, *problem.data[:2], lr=problem.lr, **problem.options)
    assert all(p[others].isfinite().all() for p in adapted)
    assert any(p[1].isnan().any() for p in adapted)


@pytest.mark.parametrize(
    "case",
    [
        Case(lr="element", momentum=0.5),
        Case(tasks=20, lr="step and layer", step_weights=(0.2, 0.3, 0.5)),
        Case(tasks=20, per_task=True),
        Case(tasks=20, support=4, lr="element"),
        Case(widths=(3, 300, 300, 2), steps=2),
    ],
    ids=repr,
)
def test_a_task_left_out_of_the_loss_leaves_no_nan(case: Case, backend: torch.device) -> None:
    """As `maml_loss(..., reduction="none")` invites to: the losses that are finite, and their gradient."""
    problem = make(replace(case, reduction="none"), torch.float32, device=backend)
    leaves = problem.leaves(query=True)
    kept = torch.arange(case.tasks, device=backend) != 1

    def gradients() -> tuple[Tensor, ...]:
        loss = metafast.maml_loss(
            problem.params, *problem.data, lr=problem.lr, **problem.options, **problem.query_options
        )
        assert loss[kept].isfinite().all()
        return torch.autograd.grad(loss[kept].sum(), leaves)

    clean = gradients()
    with torch.no_grad():
        problem.data[0][1, 2, 0] = torch.nan
    assert all(torch.equal(one, other) for one, other in zip(gradients(), clean, strict=True))


@pytest.mark.parametrize(("tasks", "support"), LANES)
def test_task_without_examples(tasks: int, support: int, backend: torch.device) -> None:
    case = Case(tasks=tasks, support=support, loss="cross_entropy")
    problem = make(case, torch.float64, device=backend)
    problem.data[1][0] = -100  # no support: not adapted
    problem.data[3][1] = -100  # no query: no loss
    loss = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    unadapted = reference.maml_loss(
        problem.params, *problem.data, lr=0.0, **problem.options, reduction="none"
    )
    assert loss[1].isnan()
    assert loss.isnan().sum() == 1
    torch.testing.assert_close(loss[0], unadapted[0])
    grad = torch.autograd.grad(loss[1], problem.params[0])[0]
    assert torch.equal(grad, torch.zeros_like(grad))


def test_no_tasks(backend: torch.device) -> None:
    problem = make(Case(tasks=0), torch.float32, device=backend)
    loss = metafast.maml_loss(problem.params, *problem.data, lr=problem.lr, **problem.options)
    assert loss.isnan()
    assert [
        a.shape[0] for a in metafast.inner_sgd(problem.params, *problem.data[:2], lr=0.1, **problem.options)
    ] == [0] * 6
    grads = torch.autograd.grad(loss, problem.params)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize(("tasks", "support"), LANES)
def test_strided_arguments(tasks: int, support: int, backend: torch.device) -> None:
    problem = make(Case(tasks=tasks, support=support, per_task=True), torch.float64, device=backend)
    expected = metafast.maml_loss(problem.params, *problem.data, lr=problem.lr, **problem.options)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.detach().mT.contiguous().mT if tensor.dim() > 1 else tensor.detach()

    params, data = [strided(p) for p in problem.params], [strided(x) for x in problem.data]
    assert not params[0].is_contiguous()
    assert torch.equal(expected, metafast.maml_loss(params, *data, lr=problem.lr.detach(), **problem.options))


def test_only_asked_gradients_exist(backend: torch.device) -> None:
    problem = make(Case(), torch.float32, device=backend)
    for leaf in problem.leaves(query=True):
        leaf.requires_grad_(leaf is problem.data[0])
    metafast.maml_loss(problem.params, *problem.data, lr=problem.lr, **problem.options).backward()
    assert problem.data[0].grad is not None
    assert all(p.grad is None for p in problem.params)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_differentiation_raises(reduction: str) -> None:
    problem = make(Case(reduction=reduction), torch.float64)
    loss = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, **problem.query_options
    )
    adapted = metafast.inner_sgd(problem.params, *problem.data[:2], lr=problem.lr, **problem.options)
    for output in (loss, adapted[0]):
        (grad,) = torch.autograd.grad(output.sum(), problem.params[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"metafast\.reference differentiates to any order"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss: expected mse or cross_entropy, got hinge"),
        (
            {"activation": "gelu"},
            ValueError,
            r"activation: expected relu, tanh or none, got gelu; other networks adapt with metafast\.adapt",
        ),
        ({"steps": -1}, ValueError, "steps: expected a number >= 0, got -1"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr: expected shape \[K, L\] = \[3, 3\], got \[2\]"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, TypeError, "lr: expected the dtype of params"),
        (
            {"lr": [torch.tensor(0.1)] * 2},
            ValueError,
            "lr: expected one tensor for each of params, 6, got 2",
        ),
        ({"lr": [torch.tensor(0.1)]}, ValueError, "lr: expected one tensor for each of params, 6, got 1"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
        (
            {"step_weights": torch.ones(2)},
            ValueError,
            r"step_weights: expected shape \[K\] = \[3\], got \[2\]",
        ),
    ],
)
def test_bad_options(change: dict, error: type[Exception], message: str) -> None:
    problem = make(Case(), torch.float32)
    options = {"lr": 0.1, **problem.options, **change}
    with pytest.raises(error, match=message):
        metafast.maml_loss(problem.params, *problem.data, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1.5}, r"steps: expected an integer, got 1\.5"),
        ({"momentum": "0.9"}, "momentum: expected a number, got '0.9'"),
        ({"lr": "0.1"}, "lr: expected a number, a tensor or a sequence of tensors, got str"),
        ({"lr": None}, "lr: expected a number, a tensor or a sequence of tensors, got None"),
        ({"lr": [0.1] * 6}, r"lr\[0\]: expected a tensor, got float"),
        ({"params": None}, "params: expected a sequence of tensors, got None"),
        ({"params": torch.nn.Linear(3, 2)}, "params: expected a sequence of tensors, got Linear"),
        ({"params": {"weight": torch.ones(2, 3)}}, "params: expected a sequence of tensors, got dict"),
        ({"params": [torch.ones(2, 3), None]}, r"params\[1\]: expected a tensor, got None"),
        ({"support_x": [[0.0]]}, "support_x: expected a tensor, got list"),
        ({"query_y": None}, "query_y: expected a tensor, got None"),
    ],
)
def test_wrong_types_are_named(change: dict, message: str) -> None:
    problem = make(Case(), torch.float32)
    data = dict(zip(("support_x", "support_y", "query_x", "query_y"), problem.data, strict=True))
    arguments = {"params": problem.params, "lr": 0.1, **data, **problem.options, **change}
    with pytest.raises(TypeError, match=message):
        metafast.maml_loss(**arguments)


def test_bad_tensors() -> None:
    problem = make(Case(), torch.float32)
    options = {"lr": 0.1, **problem.options}
    params, (support_x, support_y, query_x, query_y) = problem.params, problem.data
    data = problem.data
    with pytest.raises(ValueError, match=r"params\[2\]: expected shape \[O, I\] = \[5, 7\], got \[5, 6\]"):
        metafast.maml_loss([*params[:2], params[2][:, :6], *params[3:]], *data, **options)
    with pytest.raises(ValueError, match=r"params: expected W1, b1, .* got 5 tensors; other networks"):
        metafast.maml_loss(params[:5], *data, **options)
    with pytest.raises(ValueError, match=r"query_x: expected shape \[T, Q, D\] with T = 3, D = 3"):
        metafast.maml_loss(params, support_x, support_y, query_x[..., :2], query_y, **options)
    with pytest.raises(
        ValueError, match=r"support_y: expected shape \[T, S, O\] = \[3, 5, 2\], got \[3, 4, 2\]"
    ):
        metafast.maml_loss(params, support_x, support_y[:, :4], query_x, query_y, **options)
    with pytest.raises(TypeError, match="x: expected a tensor of dtype float32 or float64, got Half"):
        metafast.inner_sgd([p.half() for p in params], support_x.half(), support_y.half(), **options)
    labels = torch.tensor([[0, 1, 2, 0, 1]] * 3)
    with pytest.raises(
        ValueError, match=r"y: expected classes in \[0, 2\) or -100 \(ignored\), got 2 at position 2"
    ):
        metafast.inner_sgd(params, support_x, labels, **{**options, "loss": "cross_entropy"})


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_update_is_torch_sgd(momentum: float, nesterov: bool, backend: torch.device) -> None:
    torch.manual_seed(0)
    # More tensors than one launch takes, one of them of many work items.
    params = [
        torch.randn(shape, device=backend) for shape in [(), (3, 5), (0,), (4, 3, 2, 2), (300, 100)] * 14
    ]
    expected = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(expected, lr=0.1, momentum=momentum, weight_decay=0.01, nesterov=nesterov)
    buffers = None
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        for p, grad in zip(expected, grads, strict=True):
            p.grad = grad
        optimizer.step()
        params, buffers = metafast.sgd_update(
            params,
            grads,
            0.1,
            momentum_buffers=buffers,
            momentum=momentum,
            weight_decay=0.01,
            nesterov=nesterov,
        )
    torch.testing.assert_close(params, [p.detach() for p in expected])


@pytest.mark.parametrize("lr_shapes", ["one", "each"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_update_gradients(nesterov: bool, lr_shapes: str, backend: torch.device) -> None:
    torch.manual_seed(0)

    def leaves() -> list[Tensor]:
        shapes = [(3, 2), (4,)]
        return [torch.randn(s, dtype=torch.float64, device=backend, requires_grad=True) for s in shapes]

    lr = leaves()
    if lr_shapes == "one":
        lr = [torch.rand((), dtype=torch.float64, device=backend, requires_grad=True)]

    def update(*tensors: Tensor) -> tuple[Tensor, ...]:
        new_params, buffers = metafast.sgd_update(
            tensors[:2],
            tensors[2:4],
            tensors[6] if lr_shapes == "one" else tensors[6:],
            momentum_buffers=tensors[4:6],
            momentum=0.9,
            weight_decay=0.1,
            nesterov=nesterov,
        )
        return (*new_params, *buffers)

    inputs = (*leaves(), *leaves(), *leaves(), *lr)
    assert torch.autograd.gradcheck(update, inputs)
    assert torch.autograd.gradgradcheck(update, inputs)


def test_task_linear() -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 4, 5), (3, 2, 5), (3, 2)]
    )
    expected = torch.stack([F.linear(x[t], weight[t], bias[t]) for t in range(3)])
    torch.testing.assert_close(metafast.task_linear(x, weight, bias), expected)
    torch.testing.assert_close(reference.task_linear(x, weight, bias), expected)
    assert torch.autograd.gradgradcheck(metafast.task_linear, (x, weight, bias))
    with pytest.raises(
        ValueError, match=r"weight: expected shape \[T, O, I\] with T = 3, I = 5, got \[3, 5, 2\]"
    ):
        metafast.task_linear(x, weight.mT, bias)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"stride": (1, 2), "padding": (2, 0)}], ids=str
)
def test_task_conv2d(options: dict) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in [(3, 2, 2, 5, 4), (3, 3, 2, 3, 2), (3, 3)]
    )
    expected = torch.stack([F.conv2d(x[t], weight[t], bias[t], **options) for t in range(3)])
    torch.testing.assert_close(metafast.task_conv2d(x, weight, bias, **options), expected)
    torch.testing.assert_close(reference.task_conv2d(x, weight, bias, **options), expected)
    compiled = torch.compile(metafast.task_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, **options), expected)
    batch = [t.detach().unsqueeze(0).expand(2, *t.shape) for t in (x, weight, bias)]
    torch.testing.assert_close(
        torch.vmap(lambda *args: metafast.task_conv2d(*args, **options))(*batch),
        expected.expand(2, *expected.shape),
    )


@pytest.mark.parametrize("shape", [(0, 2, 2, 5, 4), (3, 0, 2, 5, 4), (3, 2, 0, 5, 4)], ids=str)
def test_task_conv2d_of_nothing(shape: tuple[int, ...]) -> None:
    tasks, _, channels, *_ = shape
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in (shape, (tasks, 3, channels, 3, 2), (tasks, 3))
    ]
    results = []
    for module in (metafast, reference):
        out = module.task_conv2d(*leaves, padding=1)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, 5, 4)}, r"x: expected shape \[T, B, C, H, W\], got \[3, 2, 5, 4\]"),
        (
            {"weight": torch.zeros(3, 3, 1, 3, 2)},
            r"weight: expected shape \[T, O, C, kh, kw\] with T = 3, C = 2, got \[3, 3, 1, 3, 2\]",
        ),
        ({"weight": torch.zeros(3, 3, 2, 6, 2)}, "weight: expected a kernel of 1 to 5 pixels, .*, got 6"),
        ({"bias": torch.zeros(3, 2)}, r"bias: expected shape \[T, O\] = \[3, 3\], got \[3, 2\]"),
        ({"stride": 0}, "stride: expected numbers > 0"),
        ({"padding": (0, -1)}, "padding: expected numbers >= 0"),
    ],
    ids=str,
)
def test_bad_convolutions(change: dict, message: str) -> None:
    args = {"x": torch.zeros(3, 2, 2, 5, 4), "weight": torch.zeros(3, 3, 2, 3, 2), "bias": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=message):
        metafast.task_conv2d(**{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(2)]}, "grads: expected 2 tensors, one for each of params, got 1"),
        ({"grads": [torch.ones(2), torch.ones(2)]}, r"grads\[1\]: expected shape .* = \[3\], got \[2\]"),
        ({"lr": [torch.tensor(0.1)]}, "lr: expected one tensor for each of params, 2, got 1"),
        (
            {"lr": [torch.ones(2), torch.ones(2)]},
            r"lr\[1\]: expected a shape that broadcasts to that of params\[1\]",
        ),
        ({"momentum_buffers": [torch.ones(2)]}, "momentum_buffers: expected 2 tensors"),
        ({"nesterov": True}, "nesterov: expected momentum, got momentum = 0"),
    ],
)
def test_bad_updates(change: dict, message: str) -> None:
    args = {
        "params": [torch.ones(2), torch.ones(3)],
        "grads": [torch.ones(2), torch.ones(3)],
        "lr": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        metafast.sgd_update(**args)


def test_update_of_nothing() -> None:
    assert metafast.sgd_update([], [], 0.1, momentum=0.9) == ([], [])
    with pytest.raises(ValueError, match="grads: expected 0 tensors"):
        metafast.sgd_update([], [torch.ones(2)], 0.1)


# --- what else an argument may be -----------------------------------------------------------------------


def test_numbers_stand_for_tensors() -> None:
    problem = make(Case(), torch.float64)
    weights = [0.2, 0.3, 0.5]
    one = metafast.maml_loss(problem.params, *problem.data, lr=0.05, step_weights=weights, **problem.options)
    lr, step_weights = (torch.tensor(numbers, dtype=torch.float64) for numbers in (0.05, weights))
    other = metafast.maml_loss(
        problem.params, *problem.data, lr=lr, step_weights=step_weights, **problem.options
    )
    assert torch.equal(one, other)


def test_parameter_lists() -> None:
    problem = make(Case(lr="element"), torch.float64)
    params, lr = torch.nn.ParameterList(problem.params), torch.nn.ParameterList(problem.lr)
    for module in (metafast, reference):
        expected = module.maml_loss(problem.params, *problem.data, lr=problem.lr, **problem.options)
        assert torch.equal(module.maml_loss(params, *problem.data, lr=lr, **problem.options), expected)
        grads = [torch.ones_like(p) for p in params]
        expected, _ = module.sgd_update(problem.params, grads, problem.lr)
        assert all(map(torch.equal, module.sgd_update(params, grads, lr)[0], expected))


@pytest.mark.parametrize("name", ["params[2]", "query_y"])
def test_another_device(name: str) -> None:
    problem = make(Case(), torch.float32)
    params, data = list(problem.params), list(problem.data)
    if name == "query_y":
        data[3] = data[3].to("meta")
    else:
        params[2] = params[2].to("meta")
    message = rf"{re.escape(name)}: expected a tensor on the device of .*, cpu, got one on meta"
    with pytest.raises(ValueError, match=message):
        metafast.maml_loss(params, *data, lr=0.1, **problem.options)


def test_info_says_what_runs_on_cuda() -> None:
    ops = metafast.info().ops
    assert ops["maml_loss"] == ops["inner_sgd"] == ops["sgd_update"] == ops["pairwise"]
    assert ops["task_linear"] == ("cpu", "cuda")


# --- torch.library, torch.compile, torch.func -----------------------------------------------------------

# One or more cases of every branch in shapes and saved tensors.
INTERFACE_CASES = [
    Case(lr="step and layer", momentum=0.5, step_weights=(0.2, 0.3, 0.5)),
    Case(lr="element", per_task=True, reduction="none"),
    Case(loss="cross_entropy", lr="constant", first_order=True),
]


def maml_loss_of(case: Case, module: Any = metafast) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """maml_loss and its tensors."""
    problem = make(case, torch.float64)

    def function(params: Sequence[Tensor], lr: Any, *data: Tensor) -> Tensor:
        return module.maml_loss(params, *data, lr=lr, **problem.options, **problem.query_options)

    return function, (problem.params, problem.lr, *problem.data)


def inner_sgd_of(case: Case, module: Any = metafast) -> tuple[Callable[..., list[Tensor]], tuple[Any, ...]]:
    problem = make(case, torch.float64)

    def function(params: Sequence[Tensor], lr: Any, *data: Tensor) -> list[Tensor]:
        return module.inner_sgd(params, *data, lr=lr, **problem.options)

    return function, (problem.params, problem.lr, *problem.data[:2])


def sgd_update_of(case: Case, module: Any = metafast) -> tuple[Callable[..., list[Tensor]], tuple[Any, ...]]:
    problem = make(case, torch.float64)

    def function(params: Sequence[Tensor], *grads_and_buffers: Tensor) -> list[Tensor]:
        grads, buffers = (grads_and_buffers[i::2] for i in range(2))
        updated = module.sgd_update(params, grads, 0.1, momentum_buffers=buffers, momentum=case.momentum)
        return [*updated[0], *updated[1]]

    noise = [torch.randn_like(p).requires_grad_() for p in problem.params for _ in range(2)]
    return function, (problem.params, *noise)


def task_linear_of(case: Case, module: Any = metafast) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    shapes = [(case.tasks, 4, 5), (case.tasks, 2, 5), (case.tasks, 2)]
    return module.task_linear, tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


CALLS = [
    pytest.param(of, case, id=f"{of.__name__.removesuffix('_of')}-{i}")
    for of, cases in (
        (maml_loss_of, INTERFACE_CASES),
        (inner_sgd_of, INTERFACE_CASES),
        (sgd_update_of, [Case(), Case(momentum=0.9)]),
        (task_linear_of, [Case()]),
    )
    for i, case in enumerate(cases)
]


def value_and_gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    fresh = tree_map(lambda t: t.detach().requires_grad_(t.requires_grad), args)
    outputs = function(*fresh)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [leaf for leaf in tree_leaves(fresh) if leaf.requires_grad]
    return [*(out.detach() for out in outputs), *gradients(outputs, leaves)]


@pytest.mark.parametrize(("of", "case"), CALLS[:-1])
def test_opcheck(of: Callable[..., Any], case: Case) -> None:
    function, args = of(case)
    with RecordOps() as record:
        value_and_gradients(function, args)
    assert {op.name().split("::")[1].removesuffix("_backward") for op in record.calls} == {
        of.__name__.removesuffix("_of")
    }
    for op, args in record.calls.items():
        needs_grad = "backward" not in op.name()
        fresh = tree_map(
            lambda x, needs_grad=needs_grad: (
                x.detach().clone().requires_grad_(needs_grad and x.is_floating_point())
                if isinstance(x, Tensor)
                else x
            ),
            args,
        )
        torch.library.opcheck(op, fresh)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("of", "case"), CALLS)
def test_compile(of: Callable[..., Any], case: Case, dynamic: bool) -> None:
    torch.compiler.reset()
    function, args = of(case)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(value_and_gradients(compiled, args), value_and_gradients(function, args))


def test_compile_with_a_number_for_lr() -> None:
    torch.compiler.reset()
    problem = make(Case(), torch.float32)

    def function(params: Sequence[Tensor], lr: float) -> Tensor:
        return metafast.maml_loss(
            params, *problem.data, lr=lr, step_weights=[0.5, 0.0, 1.0], **problem.options
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.2):
        assert torch.equal(compiled(problem.params, lr), function(problem.params, lr))


@pytest.mark.parametrize("case", INTERFACE_CASES, ids=str)
def test_gradient_transform(case: Case) -> None:
    function, (params, *others) = maml_loss_of(case)
    expected = torch.autograd.grad(function(params, *others).sum(), params)
    for transform in (
        torch.func.grad,
        lambda f: torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager"),
    ):
        torch.compiler.reset()
        found = transform(lambda params: function(params, *others).sum())(params)
        torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize(("of", "case"), CALLS)
def test_vmap(of: Callable[..., Any], case: Case) -> None:
    function, args = of(case)
    several = tree_map(lambda t: torch.stack([t, t.flip(0) if t.dim() else 2 * t]), args)
    found = torch.vmap(function)(*several)
    for i in range(2):
        expected = function(*tree_map(lambda t, i=i: t[i], several))
        torch.testing.assert_close(tree_map(lambda t, i=i: t[i], found), expected)


def test_second_derivatives_by_transforms() -> None:
    function, (params, *others) = maml_loss_of(Case())
    twin, _ = maml_loss_of(Case(), reference)

    def of_bias(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda bias: function([*params[:-1], bias], *others)

    bias = params[-1].detach()
    expected = torch.autograd.functional.hessian(of_bias(twin), bias)
    torch.testing.assert_close(torch.func.hessian(of_bias(function))(bias), expected)


def test_doors() -> None:
    function, (params, *others) = maml_loss_of(Case())

    def of_bias(bias: Tensor) -> Tensor:
        return function([*params[:-1], bias], *others)

    bias = params[-1].detach()
    with metafast.trace_doors() as doors:
        of_bias(bias)
        torch.func.grad(of_bias)(bias)
        torch.vmap(of_bias)(bias[None])
        _, tangent = torch.func.jvp(of_bias, (bias,), (bias,))
        with forward_ad.dual_level():
            dual = of_bias(forward_ad.make_dual(bias, bias))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
        torch.compile(of_bias, fullgraph=True, backend="aot_eager")(bias)
    found = ("op", "function", "function", "reference", "reference", "op")
    assert doors == [("maml_loss", door) for door in found]


def test_reference_says_what_was_expected() -> None:
    function, args = maml_loss_of(Case(activation="gelu"))
    with pytest.raises(ValueError, match="activation: expected relu, tanh or none, got gelu"):
        torch.vmap(function)(*tree_map(lambda t: t[None], args))
    function, args = maml_loss_of(Case(loss="mse"), reference)
    with pytest.raises(ValueError, match="loss: expected mse or cross_entropy, got hinge"):
        reference.inner_sgd(args[0], *args[2:4], loss="hinge", lr=0.1, steps=1)


# --- autocast -------------------------------------------------------------------------------------------


def test_autocast_changes_no_loss() -> None:
    problem = make(Case(), torch.float32)

    def loss(*data: Tensor) -> Tensor:
        return metafast.maml_loss(problem.params, *data, lr=0.1, **problem.options)

    expected = loss(*problem.data)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*problem.data), expected)
        (by_transform,) = torch.vmap(loss)(*(t[None] for t in problem.data))
    torch.testing.assert_close(by_transform, expected)


def test_task_linear_under_autocast() -> None:
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(3, 2, 5), torch.randn(3, 2)
    expected = metafast.task_linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = metafast.task_linear(x.bfloat16(), weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
    with pytest.raises(TypeError, match="weight: expected the dtype of x, BFloat16, got Float"):
        metafast.task_linear(x.bfloat16(), weight, bias)
