"""The convolutional family against a plain loop over tasks, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from convolutional_problems import (
    CASES,
    LARGE,
    LINEAR,
    NORMED,
    POOL,
    SHORT,
    WEIGHTED,
    Case,
    Problem,
    assert_near,
    forward,
    gradients,
    make,
    plain,
)
from torch import Tensor, nn

import metafast
from metafast import ConvBlock, reference

DTYPES = (torch.float64, torch.float32)


@pytest.fixture
def device(backend: torch.device, request: pytest.FixtureRequest) -> torch.device:
    emulated = "emulated" in request.node.name
    namespace = "metafast_emulated" if emulated else "metafast"
    key = "CUDA" if backend.type == "cuda" else "CPU"
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"{namespace}::conv_inner_sgd", key):
        pytest.skip("conv_inner_sgd has no CUDA kernel")
    return backend


def _adapted(module: ModuleType, problem: Problem) -> list[Tensor]:
    """The adapted parameters, the statistics, and the gradients of all that can have one."""
    params, statistics = module.conv_inner_sgd(
        problem.network,
        problem.params,
        problem.x,
        problem.y,
        lr=problem.lr,
        example_weights=problem.weights,
        **problem.options,
    )
    return [t.cpu() for t in (*params, statistics, *gradients(params, problem.leaves))]


def _expected(case: Case, of_images: bool = True) -> list[Tensor]:
    problem = make(case, torch.float64)
    problem.x.requires_grad_(of_images)
    params, statistics = plain(problem)
    channels = sum(w for b, w in zip(case.network, case.widths, strict=True) if b.norm)
    statistics = statistics.reshape(case.steps, 2, case.tasks, channels)
    return [*params, statistics, *gradients(params, problem.leaves)]


@pytest.mark.parametrize("name", CASES)
def test_the_definition(name: str) -> None:
    problem = make(CASES[name], torch.float64)
    assert_near(_adapted(reference, problem), _expected(CASES[name]), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_conv_inner_sgd(name: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = make(CASES[name], dtype, device=device)
    assert_near(_adapted(metafast, problem), _expected(CASES[name]), dtype)


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_definition_of_weights(name: str) -> None:
    problem = make(WEIGHTED[name], torch.float64)
    assert_near(_adapted(reference, problem), _expected(WEIGHTED[name]), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_examples(name: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = make(WEIGHTED[name], dtype, device=device)
    assert_near(_adapted(metafast, problem), _expected(WEIGHTED[name]), dtype)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_equal_weights_are_no_weights(loss: str, device: torch.device) -> None:
    problem = make(Case(loss=loss, ignored=True), torch.float64, device=device)
    expected = _adapted(metafast, problem)
    problem.weights = torch.full(problem.x.shape[:2], 0.3, dtype=torch.float64, device=device)
    assert_near(_adapted(metafast, problem), expected, torch.float64)


# Of grey images z of the first block may be nowhere written down; nor its gradient, if nobody wants theirs.
GREY = {
    "Conv4": CASES["Conv4"],
    "odd": CASES["odd"],
    "tanh": Case(
        (ConvBlock(3, padding=1, norm=True, activation="tanh", **POOL, pools_first=True), LINEAR),
        (20, 3),
        (1, 7, 6),
        per_task=True,
        lr="element",
    ),
    "many channels": Case(
        (ConvBlock(3, bias=False, norm=True, affine=False, **POOL), LINEAR), (70, 3), (1, 8, 9), momentum=0.5
    ),
    "first order": Case(SHORT, image=(1, 6, 5), first_order=True),
    "zeros": Case(SHORT, image=(1, 6, 5), images="half"),
    # Of variance 0, with an eps that magnifies rounding tenfold and not by 300.
    "constant channels": Case((replace(SHORT[0], eps=1e-2), *SHORT[1:]), image=(1, 6, 5), images="empty"),
    "wide padding": Case((ConvBlock(3, padding=2, **NORMED, **POOL), LINEAR), (5, 3), (1, 6, 6)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GREY)
def test_grey_images_without_their_gradient(name: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = make(GREY[name], dtype, device=device)
    problem.x.requires_grad_(False)
    assert_near(_adapted(metafast, problem), _expected(GREY[name], of_images=False), dtype)
    wide = make(GREY[name], torch.float64)
    expected = reference.conv_forward(wide.network, wide.params, wide.x)
    out = metafast.conv_forward(problem.network, problem.params, problem.x)
    found = [out, *gradients([out], problem.params)]
    assert_near([t.cpu() for t in found], [expected, *gradients([expected], wide.params)], dtype)


def test_large_images(device: torch.device) -> None:
    """In float64: some of so many windows are nearly a tie, which rounding to float32 would decide."""
    problem = make(LARGE, torch.float64, device=device)
    assert_near(_adapted(metafast, problem), _expected(LARGE), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_conv_forward(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    wide = make(case, torch.float64)
    of_tasks = [
        forward(case.network, [p[t] if case.per_task else p for p in wide.params], x, [])
        for t, x in enumerate(wide.x)
    ]
    expected = torch.stack(of_tasks)
    expected = [expected, *gradients([expected], [*wide.params, wide.x])]
    problem = make(case, dtype, device=device)
    for module in (metafast, reference):
        out = module.conv_forward(problem.network, problem.params, problem.x)
        found = [out, *gradients([out], [*problem.params, problem.x])]
        assert_near([t.cpu() for t in found], expected, dtype)


def test_without_a_graph_the_same_bits(device: torch.device) -> None:
    problem = make(CASES["Conv4"], torch.float32, device=device)
    given = problem.network, problem.params, problem.x
    found, statistics = metafast.conv_inner_sgd(*given, problem.y, lr=problem.lr, **problem.options)
    out = metafast.conv_forward(*given)
    with torch.no_grad():
        again, seen = metafast.conv_inner_sgd(*given, problem.y, lr=problem.lr, **problem.options)
        assert torch.equal(out, metafast.conv_forward(*given))
    assert all(map(torch.equal, (*found, statistics), (*again, seen)))
    assert not statistics.requires_grad


def test_memory_that_goes_from_call_to_call_carries_nothing_over(device: torch.device) -> None:
    """Maps of megabytes, whose borders are zeros where another call, of other sizes, has left NaN."""
    generator = torch.Generator().manual_seed(0)
    block = ConvBlock(3, padding=1, norm=True, pool="max", pool_kernel=2, pool_stride=2)
    network = [block, block, ConvBlock(3, padding=1, pool="average"), ConvBlock(None)]
    shapes = (16, 1, 3, 3), (16,), (16,), (16,), (16, 16, 3, 3), (16,), (16,), (16,)
    shapes += (16, 16, 3, 3), (16,), (5, 16), (5,)
    params = [torch.randn(shape, generator=generator).to(device) / 8 for shape in shapes]
    params = [param.requires_grad_() for param in params]
    x, other = (torch.randn(2, 30, 1, *size, generator=generator).to(device) for size in ((28, 28), (27, 30)))

    def results(x: Tensor) -> list[Tensor]:
        options = {"loss": "mse", "lr": 0.1, "steps": 2}
        out = metafast.conv_forward(network, params, x)
        theta, _ = metafast.conv_inner_sgd(network, params, x, torch.zeros_like(out), **options)
        total = out.square().sum() + sum(p.square().sum() for p in theta)
        return [out, *theta, *torch.autograd.grad(total, params)]

    first = results(x)
    results(torch.full_like(other, torch.nan))
    assert all(map(torch.equal, results(x), first))
    assert all(result.isfinite().all() for result in first)


def test_nan_stays_in_its_task(device: torch.device) -> None:
    problem = make(CASES["per task"], torch.float32, device=device)
    options = {"lr": problem.lr, **problem.options}
    expected, _ = metafast.conv_inner_sgd(problem.network, problem.params, problem.x, problem.y, **options)
    with torch.no_grad():
        problem.x[1] = torch.nan
    found, _ = metafast.conv_inner_sgd(problem.network, problem.params, problem.x, problem.y, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])
    assert found[0][1].isnan().all()


def test_a_parameter_list_and_sizes_as_numbers_or_pairs(device: torch.device) -> None:
    problem = make(Case(), torch.float64, device=device)
    block = ConvBlock((3, 3), (1, 1), (1, 1), **NORMED, pool="max", pool_kernel=(2, 2), pool_stride=(2, 2))
    params = nn.ParameterList(p.detach() for p in problem.params)
    for module in (metafast, reference):
        pairs, numbers = (
            module.conv_inner_sgd(net, params, problem.x, problem.y, lr=0.1, **problem.options)[0]
            for net in ((block, LINEAR), SHORT)
        )
        assert all(map(torch.equal, pairs, numbers))


def _called(network: Any = SHORT, **changed: Any) -> None:
    problem = make(Case(), torch.float64)
    given = {"params": problem.params, "x": problem.x, "y": problem.y, "lr": 0.1, **problem.options}
    metafast.conv_inner_sgd(network, **{**given, **changed})


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (SHORT[0], TypeError, "network: expected a sequence of ConvBlock, got ConvBlock"),
        (None, TypeError, "network: expected a sequence of ConvBlock, got None"),
        ([nn.Linear(2, 2)], TypeError, r"network\[0\]: expected ConvBlock, got Linear"),
        ([], ValueError, "network: expected a linear layer as its last block, got no block"),
        (SHORT[:1], ValueError, "network: expected a linear layer as its last block, got a convolution"),
        ([ConvBlock(0), LINEAR], ValueError, r"network\[0\].kernel: expected a number >= 1, got 0"),
        ([ConvBlock((3, 3, 3)), LINEAR], ValueError, r"network\[0\].kernel: expected a number or a pair"),
        ([ConvBlock(3.0), LINEAR], TypeError, r"network\[0\].kernel: expected an integer, got 3.0"),
        ([ConvBlock(3, stride=(1, 0)), LINEAR], ValueError, r"network\[0\].stride: expected a number >= 1"),
        ([ConvBlock(3, padding=-1), LINEAR], ValueError, r"network\[0\].padding: expected a number >= 0"),
        ([ConvBlock(3, eps=-1.0), LINEAR], ValueError, r"network\[0\].eps: expected a number >= 0"),
        ([ConvBlock(3, activation="gelu"), LINEAR], ValueError, r"network\[0\].activation: expected one of"),
        ([ConvBlock(3, pool="mean"), LINEAR], ValueError, r"network\[0\].pool: expected one of none, max, a"),
        (
            [ConvBlock(3, pool="max", pool_kernel=2, pool_padding=2), LINEAR],
            ValueError,
            r"network\[0\].pool_padding: expected at most half of pool_kernel, 2, got 2",
        ),
    ],
    ids=str,
)
def test_what_is_no_network(network: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _called(network)
    with pytest.raises(error, match=message):
        metafast.conv_forward(network, [torch.zeros(1, 1, 3, 3)], torch.zeros(1, 1, 1, 3, 3))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"params": torch.zeros(3)}, TypeError, "params: expected a sequence of tensors, got Tensor"),
        ({"params": []}, ValueError, "params: expected the parameters of 2 blocks, got none"),
        ({"x": None}, TypeError, "x: expected a tensor, got None"),
        ({"y": 3}, TypeError, "y: expected a tensor, got int"),
        ({"steps": 1.5}, TypeError, "steps: expected an integer, got 1.5"),
        ({"steps": -1}, ValueError, "steps: expected a number >= 0, got -1"),
        ({"momentum": "a"}, TypeError, "momentum: expected a number, got 'a'"),
        ({"momentum": -0.5}, ValueError, "momentum: expected a number >= 0, got -0.5"),
        ({"loss": "hinge"}, ValueError, "loss: expected mse or cross_entropy, got hinge"),
        ({"loss": 1}, TypeError, "loss: expected a string, got int"),
        ({"first_order": "yes"}, TypeError, "first_order: expected True or False, got 'yes'"),
        ({"lr": -0.1}, ValueError, "lr: expected a number >= 0, got -0.1"),
        ({"lr": "big"}, TypeError, "lr: expected a number, a tensor or a sequence of tensors, got str"),
        ({"lr": [torch.zeros(())]}, ValueError, "lr: expected one tensor for each of params, 6, got 1"),
        ({"lr": torch.zeros(2, 3).double()}, ValueError, r"lr: expected shape \[K, L\]"),
        ({"x": torch.zeros(3, 5, 2, 6, 5)}, TypeError, "expected .*dtype"),
        ({"x": torch.zeros(3, 5, 2, 1, 1).double()}, ValueError, "x: expected images on which the pooling"),
        ({"x": torch.zeros(3, 5, 2, 4, 4).double()}, ValueError, r"params\[4\]: expected shape \[O, I\]"),
        ({"y": torch.full((3, 5), 3)}, ValueError, r"y: expected classes in \[0, 3\) or -100 \(ignored\)"),
        ({"example_weights": [1.0]}, TypeError, "example_weights: expected a tensor, got list"),
        ({"example_weights": torch.ones(3, 5)}, TypeError, "example_weights: expected the dtype of x"),
        (
            {"example_weights": torch.ones(3, 2).double()},
            ValueError,
            r"example_weights: expected shape \[T, B\] = \[3, 5\], got \[3, 2\]",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _called(**changed)
