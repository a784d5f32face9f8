"""The inner loop ops against the reference: values, gradients, options, bad input."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inner_loop_problems import CASES, LAYOUTS, TOLERANCE, Case, Problem, assert_near, gradients, make
from record_ops import RecordOps
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import metafast
from metafast import reference
from metafast.methods import mlp


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On which a task follows in the memory of the one before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nan_stays_in_its_task(layout: Case, value: float, backend: torch.device, one_thread: None) -> None:
    problem = make(replace(layout, per_task=True), torch.float32, device=backend)
    clean = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    with torch.no_grad():
        problem.data[0][1, 2, 0] = value
    loss = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, reduction="none"
    )
    others = torch.arange(layout.tasks, device=backend) != 1
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
        *LAYOUTS,
        Case(lr="element", momentum=0.5),
        Case(tasks=20, lr="step and layer", step_weights=(0.2, 0.3, 0.5)),
        Case(tasks=20, per_task=True),
        Case(tasks=20, support=4, lr="element", momentum=0.5),
        Case(widths=(3, 300, 300, 2), steps=2, lr="step and layer", momentum=0.5),
    ],
    ids=repr,
)
def test_a_task_left_out_of_the_loss_leaves_no_nan(
    case: Case, backend: torch.device, one_thread: None
) -> None:
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_task_without_examples(layout: Case, backend: torch.device) -> None:
    problem = make(replace(layout, loss="cross_entropy"), torch.float64, device=backend)
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_strided_arguments(layout: Case, backend: torch.device) -> None:
    problem = make(replace(layout, per_task=True), torch.float64, device=backend)
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
        ({"loss": F.mse_loss}, "loss: expected a string, got function"),
        ({"activation": torch.nn.ReLU()}, "activation: expected a string, got ReLU"),
        ({"first_order": "no"}, "first_order: expected True or False, got 'no'"),
        ({"step_weights": 0.5}, "step_weights: expected a sequence of numbers or a tensor, got float"),
        ({"params": range(6)}, r"params\[0\]: expected a tensor, got int"),
        (
            {"params": torch.nn.ParameterList([torch.ones(2, 3), torch.ones(2)]), "steps": 1.5},
            r"steps: expected an integer, got 1\.5",
        ),
    ],
)
@pytest.mark.parametrize("function", [metafast.maml_loss, metafast.maml_value_and_grad])
def test_wrong_types_are_named(function: Callable[..., Any], change: dict, message: str) -> None:
    problem = make(Case(), torch.float32)
    data = dict(zip(("support_x", "support_y", "query_x", "query_y"), problem.data, strict=True))
    options = {name: value for name, value in problem.options.items() if name != "reduction"}
    with pytest.raises(TypeError, match=message):
        function(**{"params": problem.params, "lr": 0.1, **data, **options, **change})


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


# --- a meta-step without autograd -----------------------------------------------------------------------


VALUE_AND_GRAD_CASES = [
    *LAYOUTS,
    Case(lr="step and layer", momentum=0.5, step_weights=(0.2, 0.3, 0.5)),
    Case(tasks=20, lr="element", per_task=True),
    Case(widths=(300, 70, 33, 5), loss="cross_entropy", first_order=True),  # the dual form
]


def value_and_grad_of(problem: Problem) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    options = {**problem.options, "step_weights": problem.query_options["step_weights"]}
    return lambda params, *data: metafast.maml_value_and_grad(params, *data, lr=problem.lr, **options)


def autograd_of(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    value = metafast.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, **problem.query_options
    )
    return value.detach(), list(torch.autograd.grad(value, problem.params))


@pytest.mark.parametrize("case", VALUE_AND_GRAD_CASES, ids=str)
def test_value_and_grad(case: Case, backend: torch.device) -> None:
    problem = make(case, torch.float32, device=backend)
    problem.data = [t.detach() for t in problem.data]  # without their gradients the dual form may be taken
    expected, expected_grads = autograd_of(problem)
    value, grads = value_and_grad_of(problem)(problem.params, *problem.data)
    assert not any(t.requires_grad for t in (value, *grads))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert_near(grads, [g.double().cpu() for g in expected_grads], torch.float32)


def test_value_and_grad_in_compiled_and_transformed_code() -> None:
    problem = make(Case(), torch.float64)
    expected = tree_leaves(autograd_of(problem))
    function = value_and_grad_of(problem)
    for other in (
        torch.compile(function, fullgraph=True, backend="aot_eager")(problem.params, *problem.data),
        tree_map(
            lambda t: t[1],
            torch.vmap(function)(
                *tree_map(lambda t: torch.stack([2 * t, t]), (problem.params, *problem.data))
            ),
        ),
    ):
        for one, exact in zip(tree_leaves(other), expected, strict=True):
            torch.testing.assert_close(one, exact)


def test_value_and_grad_differentiated_by_a_transform() -> None:
    problem = make(Case(), torch.float64)
    first, *rest = (p.detach() for p in problem.params)
    by_hand, options = value_and_grad_of(problem), {**problem.options, "lr": problem.lr}

    def loss(weight: Tensor, module: Any = reference) -> Tensor:
        return module.maml_loss([weight, *rest], *problem.data, **options)

    expected = torch.func.grad(loss)(first)
    found = torch.func.grad(lambda weight: by_hand([weight, *rest], *problem.data)[0])(first)
    torch.testing.assert_close(found, expected)
    again = torch.func.grad(lambda weight: by_hand([weight, *rest], *problem.data)[1][0].sum())(first)
    twice = torch.func.grad(lambda weight: torch.func.grad(loss)(weight).sum())(first)
    torch.testing.assert_close(again, twice)


def test_value_and_grad_names_what_is_wrong() -> None:
    problem = make(Case(), torch.float32)
    function = value_and_grad_of(problem)
    with pytest.raises(ValueError, match=r"query_x: expected shape \[T, Q, D\]"):
        function(problem.params, *problem.data[:2], problem.data[2][..., :2], problem.data[3])
    with pytest.raises(TypeError, match="support_x: expected a tensor, got list"):
        function(problem.params, [1.0], *problem.data[1:])


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


@pytest.mark.parametrize("transformed", [False, True])
def test_parameters_may_be_a_generator(transformed: bool) -> None:
    problem = make(Case(lr="element"), torch.float64)
    x, y, _, _ = problem.data
    inner = {name: value for name, value in problem.options.items() if name != "reduction"}
    functions = {
        "inner_sgd": lambda params: metafast.inner_sgd(params, x, y, lr=problem.lr, **inner)[0].sum(),
        "maml_loss": lambda params: metafast.maml_loss(params, *problem.data, lr=problem.lr, **inner),
        "maml_value_and_grad": lambda params: metafast.maml_value_and_grad(
            params, *problem.data, lr=problem.lr, **inner
        )[0],
    }
    for name, function in functions.items():

        def scaled(by: Tensor, kind: type, function: Callable[..., Tensor] = function) -> Tensor:
            return function(kind(by * param for param in problem.params))

        one = torch.ones((), dtype=torch.float64)
        call = torch.func.grad(scaled) if transformed else scaled
        assert torch.equal(call(one, iter), call(one, list)), name


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


def test_value_and_grad_under_autocast() -> None:
    problem = make(Case(), torch.float32)
    function = value_and_grad_of(problem)
    rounded = [t.bfloat16() for t in problem.data]
    expected = tree_leaves(function(problem.params, *(t.float() for t in rounded)))
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_leaves(function(problem.params, *rounded))
    assert all(map(torch.equal, found, expected))


def test_numbers_under_autocast_keep_their_digits() -> None:
    problem = make(Case(), torch.float32)
    data = [t.bfloat16() if t.is_floating_point() else t for t in problem.data]
    weights = [1 / 3] * problem.options["steps"]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            metafast.maml_loss(problem.params, *data, lr=lr, step_weights=of_steps, **problem.options)
            for lr, of_steps in ((0.3, weights), (torch.tensor(0.3), torch.tensor(weights)))
        )
    assert torch.equal(found, expected)


def test_step_weights_may_be_a_list_of_tensors() -> None:
    problem = make(Case(), torch.float64)
    weights = [
        torch.rand((), dtype=torch.float64, requires_grad=True) for _ in range(problem.options["steps"])
    ]
    grads = []
    for package in (metafast, metafast.reference):
        loss = package.maml_loss(
            problem.params, *problem.data, lr=0.1, step_weights=weights, **problem.options
        )
        grads.append(torch.stack(torch.autograd.grad(loss, weights)))
    torch.testing.assert_close(*grads)


def test_more_steps_than_can_be_counted_are_refused() -> None:
    problem = make(Case(), torch.float32)
    with pytest.raises(ValueError, match=r"^steps: expected a number >= 0, below 2\^31, got"):
        metafast.maml_loss(problem.params, *problem.data, lr=0.1, **{**problem.options, "steps": 2**62})


def test_nan_of_a_hidden_unit_goes_all_the_way_back() -> None:
    found = []
    for package in (metafast, metafast.reference):
        params = [p.detach().clone().requires_grad_() for p in mlp(3, [8], 2, "relu").parameters()]
        x, y = torch.ones(1, 4, 3), torch.ones(1, 4, 2)
        x[0, 1, 2] = torch.nan
        adapted = package.inner_sgd(params, x, y, loss="mse", lr=0.1, steps=1)
        found.append([p.isnan() for p in adapted])
    assert all(map(torch.equal, *found))
    assert all(nan.all() for nan in found[0])
