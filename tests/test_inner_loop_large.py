"""The inner loop of large networks and long trajectories: the dual form of the first layer, features in the
lanes, parameters that are recomputed, and the gradient of step_weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated_build import EMULATED_BACKEND
from inner_loop_problems import TOLERANCE, Case, Problem, assert_near, gradients, make
from torch import Tensor

import metafast
from metafast import reference
from metafast.methods import mlp

WIDE = (300, 70, 33, 5)  # too large for many tasks at once; a first layer that pays in the dual form


def inputs_of(
    case: Case,
    dtype: torch.dtype,
    *,
    input_gradients: bool = False,
    device: torch.device | str = "cpu",
) -> Problem:
    """Step weights with a gradient, inputs without, but where asked for."""
    problem = make(case, dtype, device=device)
    for x in problem.data[::2]:
        x.requires_grad_(input_gradients)
    if case.step_weights is not None:
        problem.query_options["step_weights"].requires_grad_()
    return problem


def leaves_of(problem: Problem) -> list[Tensor]:
    weights = problem.query_options["step_weights"]
    return [*problem.leaves(query=True), *([] if weights is None else [weights])]


def loss_of(problem: Problem, module: object = metafast) -> Tensor:
    return module.maml_loss(
        problem.params, *problem.data, lr=problem.lr, **problem.options, **problem.query_options
    )


def loss_and_gradients(problem: Problem, module: object = metafast) -> list[Tensor]:
    loss = loss_of(problem, module)
    return [loss.detach(), *gradients([loss], leaves_of(problem))]


def takes_dual_form(call: Callable[[], object]) -> bool:
    """The dual form alone multiplies matrices by the library's GEMM."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    finally:
        torch.set_num_threads(threads)
    return any(event.key in ("aten::addmm", "aten::baddbmm") for event in profile.key_averages())


DUAL_CASES = [
    Case(widths=WIDE, loss="cross_entropy"),
    Case(widths=WIDE, loss="cross_entropy", momentum=0.7, activation="relu"),
    Case(widths=WIDE, loss="cross_entropy", momentum=0.7, lr="step and layer", steps=5),
    Case(widths=WIDE, lr="constant"),
    Case(widths=WIDE, lr="step and layer", step_weights=(0.2, 0.0, 0.8), momentum=0.5),
    Case(widths=WIDE, loss="cross_entropy", step_weights=(0.2, 0.3, 0.5), reduction="none"),
    Case(widths=WIDE, first_order=True, loss="cross_entropy"),
    Case(widths=WIDE, first_order=True, lr="step and layer", momentum=0.3, step_weights=(1.0, 0.5, 0.25)),
    Case(widths=WIDE, per_task=True, momentum=0.7, lr="step and layer", reduction="none"),
    Case(tasks=300, widths=(300, 65, 2), support=1, query=2),  # several tasks to a work item
    Case(tasks=14, widths=WIDE, support=7, query=11, loss="cross_entropy", activation="none"),
    Case(widths=(3000, 40), momentum=0.7, lr="step and layer"),  # one layer: the outputs are its own
    Case(widths=(700, 64, 64, 64, 5), support=2, query=9, loss="cross_entropy", steps=1, activation="relu"),
]
DIRECT_CASES = [
    Case(widths=WIDE, lr="element", momentum=0.7, step_weights=(0.2, 0.3, 0.5)),
    Case(widths=WIDE, lr="element", per_task=True, loss="cross_entropy", reduction="none"),
    Case(tasks=20, widths=(10, 130, 120, 2), support=17, query=6, momentum=0.7),
    Case(widths=(5, 800, 17), support=9, lr="step and layer", first_order=True, momentum=0.3),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", DUAL_CASES + DIRECT_CASES, ids=str)
def test_large_networks(case: Case, dtype: torch.dtype) -> None:
    problem = inputs_of(case, dtype)
    assert takes_dual_form(lambda: loss_and_gradients(problem)) == (case in DUAL_CASES)
    expected = loss_and_gradients(inputs_of(case, torch.float64), reference)
    assert_near(loss_and_gradients(problem), expected, dtype)
    with torch.no_grad():
        assert_near([loss_of(problem)], expected[:1], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*DUAL_CASES[2:9:2], *DUAL_CASES[11:], DIRECT_CASES[0]], ids=str)
@pytest.mark.parametrize(
    "backend", [EMULATED_BACKEND, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_large_networks_on_cuda(case: Case, dtype: torch.dtype, backend: torch.device) -> None:
    problem = inputs_of(case, dtype, device=backend)
    expected = loss_and_gradients(inputs_of(case, torch.float64), reference)
    assert_near(loss_and_gradients(problem), expected, dtype)
    with torch.no_grad():
        assert_near([loss_of(problem)], expected[:1], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [c for c in DUAL_CASES[:9] if c.reduction == "mean"], ids=str)
def test_large_networks_with_gradients_of_inputs(case: Case, dtype: torch.dtype) -> None:
    problem = inputs_of(case, dtype, input_gradients=True)
    assert not takes_dual_form(lambda: loss_and_gradients(problem))
    expected = loss_and_gradients(inputs_of(case, torch.float64, input_gradients=True), reference)
    assert_near(loss_and_gradients(problem), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [DUAL_CASES[1], DIRECT_CASES[0], DIRECT_CASES[2]], ids=str)
def test_inner_sgd_of_large_networks(case: Case, dtype: torch.dtype) -> None:
    def adapt(problem: Problem, module: object) -> list[Tensor]:
        adapted = module.inner_sgd(problem.params, *problem.data[:2], lr=problem.lr, **problem.options)
        return [*adapted, *gradients(adapted, problem.leaves(query=False))]

    assert_near(adapt(make(case, dtype), metafast), adapt(make(case, torch.float64), reference), dtype)


def test_dual_form_only_where_it_pays() -> None:
    for case in (
        replace(DUAL_CASES[0], steps=0),  # nothing to adapt
        replace(DUAL_CASES[0], widths=(40, 20, 5)),  # small: many tasks at once
        replace(DUAL_CASES[0], widths=(10, 300, 300, 5), support=30),  # more examples than features
    ):
        assert not takes_dual_form(lambda case=case: loss_and_gradients(inputs_of(case, torch.float32)))


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("tasks", [1, 2, 37])
def test_dual_form_has_the_same_bits_with_any_number_of_threads(tasks: int, per_task: bool) -> None:
    case = Case(tasks=tasks, widths=WIDE, per_task=per_task, loss="cross_entropy", momentum=0.7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(inputs_of(case, torch.float32)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_omniglot_network_has_the_same_bits_with_any_number_of_threads() -> None:
    params = [p.detach().requires_grad_() for p in mlp(784, [256, 128, 64], 5, "relu").parameters()]
    x, labels = torch.rand(16, 5, 784), torch.arange(5).expand(16, 5)
    query, targets = torch.rand(16, 25, 784), torch.arange(5).repeat(5).expand(16, 25)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            loss = metafast.maml_loss(
                params, x, labels, query, targets, loss="cross_entropy", lr=0.1, steps=2
            )
            results.append([loss, *torch.autograd.grad(loss, params)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("position", [0, 2])  # of the support, of the query
def test_nan_stays_in_its_task_in_the_dual_form(position: int) -> None:
    problem = inputs_of(Case(widths=WIDE, per_task=True, reduction="none"), torch.float32)
    clean = loss_of(problem)
    with torch.no_grad():
        problem.data[position][1, 2, 0] = torch.nan
    loss = loss_of(problem)
    others = torch.tensor([True, False, True])
    assert loss[1].isnan()
    assert torch.equal(loss[others], clean[others])
    for grad in torch.autograd.grad(loss.sum(), problem.params):
        assert grad[others].isfinite().all()
        assert grad[1].isnan().any()


def test_task_without_examples_in_the_dual_form() -> None:
    problem = inputs_of(Case(widths=WIDE, loss="cross_entropy", reduction="none"), torch.float64)
    problem.data[1][0] = -100  # no support: not adapted
    problem.data[3][1] = -100  # no query: no loss
    loss = loss_of(problem)
    unadapted = reference.maml_loss(
        problem.params, *problem.data, lr=0.0, **problem.options, reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(loss[0], unadapted[0])
    (grad,) = torch.autograd.grad(loss[1], problem.params[0])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("per_task", [False, True])
def test_no_tasks_in_the_dual_form(per_task: bool) -> None:
    problem = inputs_of(Case(tasks=0, widths=WIDE, per_task=per_task), torch.float32)
    loss = loss_of(problem)
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, problem.params):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("per_task", [False, True])
def test_dual_form_in_other_modes(per_task: bool) -> None:
    problem = inputs_of(Case(widths=(700, *WIDE[1:]), per_task=per_task), torch.float32)
    expected = loss_of(problem)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(problem), expected)
    with torch.no_grad():
        without_graph = loss_of(problem)
        assert takes_dual_form(lambda: loss_of(problem))
    with torch.inference_mode():
        assert torch.equal(loss_of(problem), without_graph)
        data = [x.clone() for x in problem.data]  # inference tensors
        options = {**problem.options, **problem.query_options}
        assert torch.equal(metafast.maml_loss(problem.params, *data, lr=problem.lr, **options), without_graph)


# --- step_weights ---------------------------------------------------------------------------------------

WEIGHTED_CASES = [
    Case(tasks=tasks, step_weights=(0.2, 0.0, 0.8), reduction=reduction, first_order=first_order)
    for tasks in (3, 20)
    for reduction in ("mean", "none")
    for first_order in (False, True)
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", WEIGHTED_CASES, ids=str)
def test_gradient_of_step_weights(case: Case, dtype: torch.dtype) -> None:
    expected = loss_and_gradients(inputs_of(case, torch.float64), reference)
    assert_near(loss_and_gradients(inputs_of(case, dtype)), expected, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_step_weights_alone(reduction: str) -> None:
    problem = inputs_of(WEIGHTED_CASES[0], torch.float64)
    problem.query_options["reduction"] = reduction
    weights = problem.query_options["step_weights"]
    for leaf in problem.leaves(query=True):
        leaf.requires_grad_(False)
    loss_of(problem).sum().backward()
    torch.testing.assert_close(
        weights.grad, torch.autograd.grad(loss_of(problem, reference).sum(), weights)[0]
    )
    (grad,) = torch.autograd.grad(loss_of(problem).sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"metafast\.reference differentiates to any order"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_with_a_gradient_of_step_weights(reduction: str) -> None:
    torch.compiler.reset()
    problem = inputs_of(replace(WEIGHTED_CASES[0], reduction=reduction), torch.float64)

    def function(weights: Tensor) -> Tensor:
        options = {**problem.options, "reduction": reduction, "step_weights": weights}
        return metafast.maml_loss(problem.params, *problem.data, lr=problem.lr, **options).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weights = problem.query_options["step_weights"]
    for out, other in zip(
        torch.autograd.grad(compiled(weights), leaves_of(problem)),
        torch.autograd.grad(function(weights), leaves_of(problem)),
        strict=True,
    ):
        torch.testing.assert_close(out, other)


# --- trajectories that are recomputed -------------------------------------------------------------------


@pytest.fixture
def trajectory_bytes() -> Iterator[Callable[[int], None]]:
    before = metafast.get_trajectory_bytes()
    yield metafast.set_trajectory_bytes
    metafast.set_trajectory_bytes(before)


def long(steps: int, **options: object) -> Case:
    weights = tuple(0.1 * (i % 3) for i in range(steps))
    return Case(steps=steps, step_weights=weights, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 10, 23])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.7, "lr": "constant"},
        {"momentum": 0.7, "lr": "step and layer", "first_order": True},
        {"tasks": 20, "momentum": 0.7, "lr": "step and layer"},
        {"tasks": 20, "lr": "constant"},
        {"widths": WIDE, "loss": "cross_entropy", "momentum": 0.7},
        {"widths": WIDE, "lr": "element", "momentum": 0.7},
        {"widths": WIDE, "lr": "constant"},
    ],
    ids=str,
)
def test_recomputed_trajectory_has_the_same_bits(
    steps: int, options: dict, trajectory_bytes: Callable[[int], None]
) -> None:
    case = long(steps, **options)
    trajectory_bytes(1 << 40)
    kept = loss_and_gradients(inputs_of(case, torch.float32))
    trajectory_bytes(0)
    recomputed = loss_and_gradients(inputs_of(case, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


PEAK = """
import re, sys, torch, metafast
torch.set_num_threads(1)
limit, steps = (int(arg) for arg in sys.argv[1:])
metafast.set_trajectory_bytes(limit)
params = [torch.randn(size).requires_grad_() for size in ((500, 400), (500,), (2, 500), (2,))]
data = [torch.randn(2, 3, size) for size in (400, 2, 400, 2)]
lr = [torch.full(p.shape, 1e-3) for p in params]  # the direct form, in which W1 moves

def run(steps):
    loss = metafast.maml_loss(params, *data, loss="mse", lr=lr, steps=steps)
    torch.autograd.grad(loss, params)
    status = open("/proc/self/status").read()  # rusage would begin with the peak of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

before = run(1)
print(run(steps) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_peak_memory_is_what_the_documentation_says() -> None:
    steps, set_bytes = 64, 4 * (500 * 416 + 2 * 512)  # rows padded to vectors

    def peak(limit: int) -> float:  # beyond that of one step, in sets of parameters
        command = [sys.executable, "-c", PEAK, str(limit), str(steps)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return int(found) / set_bytes

    assert steps - 6 < peak(1 << 40) < steps + 6
    assert 2 * 8 - 8 < peak(8 * set_bytes) < 2 * 8 + 6


def test_trajectory_bytes(trajectory_bytes: Callable[[int], None]) -> None:
    trajectory_bytes(12345)
    assert metafast.get_trajectory_bytes() == 12345
    with pytest.raises(ValueError, match="limit: expected a number >= 0, got -1"):
        trajectory_bytes(-1)
    assert metafast.get_trajectory_bytes() == 12345
