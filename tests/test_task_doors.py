"""The inner loop inside torch.func: right against the reference, and through its kernels where they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast
from metafast import reference

EXAMPLES, TASKS, FEATURES, OUTPUTS, STEPS = 3, 2, 3, 2, 2
OPTIONS = {"loss": "mse", "steps": STEPS, "activation": "tanh", "momentum": 0.6}


def params(*lead: int) -> list[Tensor]:
    shapes = ((4, FEATURES), (4,), (OUTPUTS, 4), (OUTPUTS,))
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes]


def data(*lead: int) -> list[Tensor]:
    """Support x and y, query x and y."""
    shapes = ((5, FEATURES), (5, OUTPUTS), (6, FEATURES), (6, OUTPUTS))
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes]


def loss(module: Any) -> Callable[..., Tensor]:
    """Of all the tasks of an example, weighed by step."""

    def function(params: Sequence[Tensor], lr: Tensor, *data: Tensor) -> Tensor:
        return module.maml_loss(params, *data, lr=lr, step_weights=(0.3, 0.7), **OPTIONS)

    return function


def adapted(module: Any) -> Callable[..., Tensor]:
    def function(params: Sequence[Tensor], lr: Tensor, *data: Tensor) -> Tensor:
        found = module.inner_sgd(params, *data[:2], lr=lr, **OPTIONS)
        return torch.cat([parameter.flatten(1) for parameter in found], 1).square().sum()

    return function


OPS = {"maml_loss": loss, "inner_sgd": adapted}
SHARED = (None, None, 0, 0, 0, 0)  # in_dims: every example has its own data, all have the same networks
FUSED, BACKWARD_BY_REFERENCE, REFERENCE = ["function"], ["function", "reference"], ["reference"]


def total_over_examples(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda params, lr, *data: torch.vmap(function, SHARED)(params, lr, *data).square().sum()


# The transform, the leading dimensions of params, lr and data, and the doors that its calls take.
CASES: dict[
    str, tuple[Callable[[Any], Any], tuple[int, ...], tuple[int, ...], tuple[int, ...], list[str]]
] = {
    "vmap over data": (lambda f: torch.vmap(f, SHARED), (), (), (EXAMPLES, TASKS), FUSED),
    "vmap over networks": (
        lambda f: torch.vmap(f, (0, *[None] * 5)),
        (EXAMPLES,),
        (),
        (TASKS,),
        FUSED,
    ),
    "vmap, networks of each task": (
        lambda f: torch.vmap(f, (0, None, 0, 0, 0, 0)),
        (EXAMPLES, TASKS),
        (),
        (EXAMPLES, TASKS),
        FUSED,
    ),
    "vmap over data, networks of each task": (
        lambda f: torch.vmap(f, SHARED),
        (TASKS,),
        (),
        (EXAMPLES, TASKS),
        FUSED,
    ),
    "vmap of another dimension": (
        lambda f: torch.vmap(f, (None, None, 1, 1, 1, 1)),
        (),
        (),
        (TASKS, EXAMPLES),
        FUSED,
    ),
    "grad of all": (lambda f: torch.func.grad(f, (0, 1, 2, 3)), (), (), (TASKS,), FUSED),
    "vmap(grad)": (lambda f: torch.vmap(torch.func.grad(f), SHARED), (), (), (EXAMPLES, TASKS), FUSED),
    "vmap(grad), networks of each task": (
        lambda f: torch.vmap(torch.func.grad(f, (0, 2)), SHARED),
        (TASKS,),
        (),
        (EXAMPLES, TASKS),
        FUSED,
    ),
    "vmap(vmap(grad))": (
        lambda f: torch.vmap(torch.vmap(torch.func.grad(f), SHARED), SHARED),
        (),
        (),
        (4, EXAMPLES, TASKS),
        FUSED,
    ),
    "vmap(grad) of lr": (
        lambda f: torch.vmap(torch.func.grad(f, 1), SHARED),
        (),
        (),
        (EXAMPLES, TASKS),
        BACKWARD_BY_REFERENCE,
    ),
    "vmap over lr": (
        lambda f: torch.vmap(f, (None, 0, None, None, None, None)),
        (),
        (EXAMPLES,),
        (TASKS,),
        BACKWARD_BY_REFERENCE,
    ),
    "grad(vmap)": (
        lambda f: torch.func.grad(total_over_examples(f), (0, 1, 2, 3)),
        (),
        (),
        (EXAMPLES, TASKS),
        FUSED,
    ),
    "jacrev": (
        lambda f: torch.func.jacrev(lambda *args: f(*args).sin()[None].expand(2), (0, 2)),
        (),
        (),
        (TASKS,),
        FUSED,
    ),
    "grad(grad)": (
        lambda f: torch.func.grad(lambda *args: torch.func.grad(f)(*args)[0].square().sum()),
        (),
        (),
        (TASKS,),
        REFERENCE,
    ),
    "jvp": (
        lambda f: lambda p, lr, *d: torch.func.jvp(lambda p: f(p, lr, *d), (p,), (p,)),
        (),
        (),
        (TASKS,),
        REFERENCE,
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_transform(name: str, op: str) -> None:
    torch.manual_seed(0)
    transform, of_params, of_lr, of_data, doors = CASES[name]
    lr = 0.1 * torch.rand(*of_lr, STEPS, 2, dtype=torch.float64)
    args = (params(*of_params), lr, *data(*of_data))
    with metafast.trace_doors() as taken:
        found = transform(OPS[op](metafast))(*args)
    torch.testing.assert_close(found, transform(OPS[op](reference))(*args))
    assert [door for _, door in taken] == doors


@pytest.mark.parametrize("op", OPS)
def test_autograd_through_vmap(op: str) -> None:
    leaves = [p.requires_grad_() for p in params()]
    lr, examples = torch.full((STEPS, 2), 0.1, dtype=torch.float64), data(EXAMPLES, TASKS)
    grads = [
        torch.autograd.grad(torch.vmap(OPS[op](module), SHARED)(leaves, lr, *examples).sum(), leaves)
        for module in (metafast, reference)
    ]
    torch.testing.assert_close(*grads)


def test_first_order() -> None:
    args, rates = params(), torch.tensor(0.1, dtype=torch.float64)
    examples = data(EXAMPLES, TASKS)
    grads = []
    for module in (metafast, reference):

        def function(params: Sequence[Tensor], *data: Tensor, module: Any = module) -> Tensor:
            return module.maml_loss(params, *data, lr=rates, first_order=True, **OPTIONS)

        grads.append(torch.vmap(torch.func.grad(function), (None, 0, 0, 0, 0))(args, *examples))
    torch.testing.assert_close(*grads)


def test_nan_stays_in_its_example() -> None:
    examples = data(EXAMPLES, TASKS)
    examples[0][1, 0, 2, 0] = torch.nan
    gradient = torch.vmap(torch.func.grad(loss(metafast)), SHARED)
    grads = gradient(params(), torch.full((STEPS, 2), 0.1, dtype=torch.float64), *examples)
    for grad in grads:
        assert grad[[0, 2]].isfinite().all()
        assert grad[1].isnan().any()


def test_labels() -> None:
    support, query = (
        torch.randint(0, OUTPUTS, (EXAMPLES, TASKS, 5)),
        torch.randint(0, OUTPUTS, (EXAMPLES, TASKS, 6)),
    )
    support[:, 0, 1] = -100
    support_x, _, query_x, _ = data(EXAMPLES, TASKS)
    args = (params(), support_x, support, query_x, query)
    grads = []
    with metafast.trace_doors() as doors:
        for module in (metafast, reference):

            def function(params: Sequence[Tensor], *data: Tensor, module: Any = module) -> Tensor:
                return module.maml_loss(params, *data, lr=0.1, loss="cross_entropy", steps=STEPS)

            grads.append(torch.vmap(torch.func.grad(function, (0, 1, 3)), (None, 0, 0, 0, 0))(*args))
    torch.testing.assert_close(*grads)
    assert doors == [("maml_loss", "function")]
    support[0, 0, 0] = OUTPUTS
    with pytest.raises(ValueError, match=r"support_y: expected classes in \[0, 2\) or -100"):
        torch.vmap(
            lambda *data: metafast.maml_loss(args[0], *data, lr=0.1, loss="cross_entropy", steps=STEPS)
        )(*args[1:])


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_negative_numbers_are_refused(name: str) -> None:
    theta, examples = params(), data(TASKS)
    options = {"lr": 0.1, name: -1.0}
    message = f"{name}: expected a number >= 0, got -1.0"
    with pytest.raises(ValueError, match=message):
        metafast.sgd_update(theta, theta, **options)
    if name == "weight_decay":
        return
    for call, given in ((metafast.maml_loss, examples), (metafast.inner_sgd, examples[:2])):
        with pytest.raises(ValueError, match=message):
            call(theta, *given, loss="mse", steps=1, **options)
