"""Convolutional networks under autocast on a GPU: products of rounded factors, and all else float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutional_problems import LINEAR, NORMED, POOL, Case, Problem, gradients, make, plain
from emulated_build import EMULATED_BACKEND
from torch import Tensor, nn

import metafast
from metafast import ConvBlock
from metafast._dispatch import doors, fakes
from metafast.ops.convolutional import _encoded as encoded

# The first convolution's images have few channels, so its factors stay as they are; 16 outputs are not few.
NETWORK = (ConvBlock(3, padding=1, **NORMED, **POOL), ConvBlock(3, padding=1, **NORMED), LINEAR)
# The second's is of pairs in "pairs", where its bias, which the norm takes away, has a gradient of rounding.
CASES = {
    "numbers": Case(NETWORK, (16, 32, 16), (3, 7, 6), tasks=2),
    "pairs": Case(NETWORK, (32, 64, 16), (3, 7, 6), tasks=2),
    "pairs, grey images": Case(NETWORK, (32, 64, 16), (1, 7, 6), tasks=2),
}
CASE = CASES["pairs"]
SECOND_BIAS = 5  # among the parameters
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
BFLOAT16, TF32 = 2**-8, 2**-11  # half a unit in the last place
FLIPS = (
    BFLOAT16 / 10
)  # of the few factors that lie between two numbers, which float32's error rounds the other way

pytestmark = pytest.mark.parametrize(
    "backend", [EMULATED_BACKEND, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(autouse=True)
def ieee() -> Any:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def autocast(backend: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """On the emulator, whose tensors are on the CPU, that of the CPU stands for the GPU's."""
    return torch.autocast(backend.type, dtype)


def without_bias(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for i, tensor in enumerate(tensors) if i != SECOND_BIAS]


def adapted(problem: Problem) -> list[Tensor]:
    """The adapted parameters and the statistics."""
    p = problem
    params, statistics = metafast.conv_inner_sgd(p.network, p.params, p.x, p.y, lr=p.lr, **p.options)
    return [*params, statistics]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, relative to a tensor's largest element; one that is 0 has that of the others."""
    floor = max(t.abs().max().item() for t in expected) / 100
    return max(
        ((a.double().cpu() - b.double().cpu()).abs().max() / max(b.abs().max().item(), floor)).item()
        for a, b in zip(found, expected, strict=True)
    )


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative, of all tensors together."""
    one, other = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (found, expected))
    return ((one - other).norm() / other.norm()).item()


# --- what is meant ------------------------------------------------------------------------------------------

FACTORS = {"maps": ("images", "weight"), "images": ("maps", "weight"), "weight": ("images", "maps")}


class Product(torch.autograd.Function):
    """A product of a convolution, of factors rounded to bfloat16; its derivatives are such products too."""

    generate_vmap_rule = False

    @staticmethod
    def forward(onto: str, sizes: dict[str, Any], padding: int, one: Tensor, other: Tensor) -> Tensor:
        one, other = (factor.bfloat16().to(factor.dtype) for factor in (one, other))
        if onto == "maps":
            return F.conv2d(one, other, padding=padding)
        if onto == "images":
            return nn.grad.conv2d_input(sizes[onto], other, one, padding=padding)
        return nn.grad.conv2d_weight(one, sizes[onto], other, padding=padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.onto, ctx.sizes, ctx.padding, *factors = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = {ctx.onto: grad, **dict(zip(FACTORS[ctx.onto], ctx.saved_tensors, strict=True))}
        found = (
            Product.apply(by, ctx.sizes, ctx.padding, *(operands[name] for name in FACTORS[by]))
            for by in FACTORS[ctx.onto]
        )
        return None, None, None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        one, other = ctx.saved_tensors
        product = (ctx.onto, ctx.sizes, ctx.padding)
        parts = [
            Product.apply(*product, *factors)
            for factors in ((tangents[3], other), (one, tangents[4]))
            if all(factor is not None for factor in factors)
        ]
        return sum(parts[1:], parts[0])


def convolved(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return Product.apply("maps", {"images": x.shape, "weight": weight.shape}, padding, x, weight)


def outputs(params: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """NETWORK on a task's images, and the means and variances of its norms."""
    statistics = []

    def normed(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        statistics.append((z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)))
        return F.relu(F.batch_norm(z, None, None, gamma, beta, training=True))

    weight, bias, *affine = params[:4]
    x = F.max_pool2d(normed(F.conv2d(x, weight, bias, padding=1), *affine), 2)
    weight, bias, *affine = params[4:8]
    x = normed(convolved(x, weight, 1) + bias[:, None, None], *affine)
    weight, bias = params[8:]
    out = convolved(x, weight.unflatten(1, x.shape[1:]), 0).flatten(1) + bias
    return out, [torch.cat(of) for of in zip(*statistics, strict=True)]


def differentiated(x: Tensor, y: Tensor) -> Callable[..., Any]:
    """A task's gradient as a function of its parameters; and the statistics."""

    def loss(*params: Tensor) -> tuple[Tensor, Tensor]:
        out, statistics = outputs(params, x)
        return F.cross_entropy(out, y), torch.stack(statistics)

    return torch.func.grad(loss, tuple(range(10)), has_aux=True)


def of_tasks(problem: Problem) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """Each task's parameters, images and labels, in double."""
    theta = [p.detach().cpu().double() for p in problem.params]
    return list(
        zip([theta] * len(problem.x), problem.x.detach().cpu().double(), problem.y.cpu(), strict=True)
    )


# --- forward and backward -----------------------------------------------------------------------------------


@EVERY_CASE
def test_steps_multiply_rounded_factors(case: Case, backend: torch.device) -> None:
    problem = make(case, torch.float32, device=backend)
    with autocast(backend):
        found = adapted(problem)
    rate, ends, statistics = problem.lr.item(), [], []
    for theta, x, y in of_tasks(problem):
        seen = []
        for _ in range(case.steps):
            grads, moments = differentiated(x, y)(*theta)
            theta = [p - rate * g for p, g in zip(theta, grads, strict=True)]
            seen.append(moments)
        ends.append(theta)
        statistics.append(torch.stack(seen))
    expected = [torch.stack(of) for of in zip(*ends, strict=True)]
    expected.append(torch.stack(statistics, 2))
    assert error(without_bias(found), without_bias(expected)) < FLIPS


@EVERY_CASE
def test_the_way_back_multiplies_rounded_factors(case: Case, backend: torch.device) -> None:
    """Of one step, whose product with the Hessian is forward over reverse; outside the region."""
    problem = make(replace(case, steps=1), torch.float32, device=backend)
    with autocast(backend):
        found = adapted(problem)[:-1]
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=generator) for p in found]
    grads = torch.autograd.grad(found, [*problem.params, problem.lr], [g.to(backend) for g in v])
    rate, expected, of_rate = problem.lr.item(), [], torch.zeros((), dtype=torch.float64)
    for task, (theta, x, y) in enumerate(of_tasks(problem)):
        of_task = [g[task].double() for g in v]
        gradient = differentiated(x, y)
        directions = tuple(-rate * g for g in of_task)
        momentum, product, _ = torch.func.jvp(gradient, tuple(theta), directions, has_aux=True)
        expected.append([g + h for g, h in zip(of_task, product, strict=True)])
        of_rate -= sum((g * m).sum() for g, m in zip(of_task, momentum, strict=True))
    of_params = [torch.stack(of).sum(0) for of in zip(*expected, strict=True)]
    assert error(without_bias(grads), without_bias([*of_params, of_rate])) < FLIPS


@EVERY_CASE
def test_outputs_and_their_gradients_multiply_rounded_factors(case: Case, backend: torch.device) -> None:
    problem = make(case, torch.float32, device=backend)
    with autocast(backend):
        out = metafast.conv_forward(NETWORK, problem.params, problem.x)
    found = [*gradients([out], problem.params), out]
    theta = [p.detach().cpu().double().requires_grad_() for p in problem.params]
    expected = torch.stack([outputs(theta, x)[0] for _, x, _ in of_tasks(problem)])
    expected = [*gradients([expected], theta), expected]
    assert error(without_bias(found), without_bias(expected)) < FLIPS


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.bfloat16, BFLOAT16), (torch.float16, TF32)], ids=["bfloat16", "float16"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_autocast_chooses_it(dtype: torch.dtype, unit: float, momentum: float, backend: torch.device) -> None:
    case = replace(CASE, momentum=momentum)
    problem = make(case, torch.float32, device=backend)
    exact = make(case, torch.float64)
    with autocast(backend, dtype):
        found = adapted(problem)[:-1]
    expected, _ = plain(exact)
    assert unit / 100 < distance(found, expected) < unit
    grads = gradients(found, problem.leaves)
    assert unit / 10 < distance(grads, gradients(expected, exact.leaves)) < unit * 10
    assert all(tensor.dtype == torch.float32 for tensor in (*found, *grads))


def test_float32_and_float64_stay_what_they_are(backend: torch.device) -> None:
    problem = make(CASE, torch.float32, device=backend)
    before = adapted(problem)
    with autocast(backend):
        rounded = adapted(problem)
    assert all(map(torch.equal, before, adapted(problem)))
    assert not any(map(torch.equal, before[:-1], rounded[:-1]))
    double = make(CASE, torch.float64, device=backend)
    expected = adapted(double)
    with autocast(backend):
        found = adapted(double)
    assert all(map(torch.equal, found, expected))


def test_compiled_regions_choose_it_too(backend: torch.device) -> None:
    problem = make(CASE, torch.float32, device=backend)

    def run(params: list[Tensor]) -> list[Tensor]:
        with autocast(backend):
            theta, _ = metafast.conv_inner_sgd(
                NETWORK, params, problem.x, problem.y, lr=0.05, **problem.options
            )
            return [*theta, metafast.conv_forward(NETWORK, theta, problem.x)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [
        [*(out := function(problem.params)), *gradients(out, problem.params)] for function in (run, compiled)
    ]
    assert all(map(torch.equal, *results))


def test_adapt_takes_the_fused_path_with_it(backend: torch.device) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3)).to(backend)
    x, query = torch.randn(2, 2, 6, 1, 8, 8, device=backend)
    y = torch.randint(3, (2, 6), device=backend)

    def run() -> list[Tensor]:
        adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.02, steps=2)
        assert adapted.path == "fused"
        out = adapted(query)
        return [out, *adapted.params.values()]

    exact = run()
    with autocast(backend):
        rounded = run()
    of_exact, of_rounded = (gradients(results, list(module.parameters())) for results in (exact, rounded))
    assert BFLOAT16 / 10 < distance(rounded, exact) < BFLOAT16 * 10
    assert BFLOAT16 / 10 < distance(of_rounded, of_exact) < BFLOAT16 * 10


# --- the products alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_16_bits_are_exact_but_for_their_sums(dtype: torch.dtype, backend: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"images": (2, 3, 16, 7, 6), "weight": (2, 32, 16, 3, 3), "maps": (2, 3, 32, 7, 6)}
    operands = {
        name: torch.randn(shape, generator=generator).to(backend, dtype) for name, shape in shapes.items()
    }
    for onto, names in FACTORS.items():
        sizes = [] if onto == "maps" else [list(shapes[onto][3:])]
        op = getattr(doors.ops, f"task_conv2d_{onto}").default
        found, exact = (
            op(*(operands[name].to(of) for name in names), *sizes, [1, 1], [1, 1])
            for of in (dtype, torch.float64)
        )
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= bound).all()


# --- errors -------------------------------------------------------------------------------------------------


def test_other_dtypes_are_refused(backend: torch.device) -> None:
    problem = make(CASE, torch.float32, device=backend)
    arguments = (problem.params, problem.x, *encoded(NETWORK))
    with pytest.raises(TypeError, match="product_dtype: expected bfloat16, float16 or None, got Double"):
        doors.ops.conv_forward.default(*arguments, torch.float64, False)
    if backend.type == "cpu":
        with pytest.raises(ValueError, match="product_dtype: expected None on the CPU, got BFloat16"):
            torch.ops.metafast.conv_forward.default(*arguments, torch.bfloat16, False)


def test_fakes_know_how_much_a_forward_keeps(backend: torch.device) -> None:
    case = replace(CASE, image=(5, 7, 6))
    for dtype, product_dtype in (
        (torch.float32, None),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ):
        problem = make(case, dtype, device=backend)
        arguments = (problem.params, problem.x, *encoded(NETWORK), product_dtype, True)
        _, kept = doors.ops.conv_forward.default(*arguments)
        assert fakes._conv_forward(*arguments)[1].shape == kept.shape
