"""The ops around networks that `inner_sgd` does not know: sgd_update, task_linear, task_conv2d."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import metafast
from metafast import reference


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


# x, weight, options: what the kernels take apart in a way of its own.
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict]] = {
    "more images than a cache holds": ((2, 3, 3, 34, 40), (2, 20, 3, 3, 3), {"padding": 1}),
    "a stride beyond the kernel": ((2, 2, 3, 11, 10), (2, 5, 3, 2, 1), {"stride": (3, 2)}),
    "padding beyond the kernel": ((2, 2, 4, 3, 4), (2, 3, 4, 2, 2), {"padding": (4, 3), "stride": (2, 1)}),
    "a kernel of one pixel": ((3, 1, 18, 4, 5), (3, 17, 18, 1, 1), {}),
    "a kernel of the whole image": ((2, 3, 2, 5, 4), (2, 7, 2, 5, 4), {}),
    "one channel": ((5, 1, 1, 6, 7), (5, 1, 1, 3, 3), {"padding": 1}),
    "many tasks": ((70, 2, 2, 4, 4), (70, 3, 2, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_derivatives(name: str, backend: torch.device) -> None:
    """All three products, and each as the derivative of the others."""
    shape, weight_shape, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    leaves = [
        torch.randn(s, dtype=torch.float64, device=backend, requires_grad=True) for s in (shape, weight_shape)
    ]
    found = []
    for convolve in (
        lambda x, weight: metafast.task_conv2d(x, weight, **options),
        lambda x, weight: torch.stack([F.conv2d(*pair, **options) for pair in zip(x, weight, strict=True)]),
    ):
        out = convolve(*leaves)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        found.append([out, *grads, *seconds])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.ones(2)}, "params: expected a sequence of tensors, got Tensor"),
        ({"grads": None}, "grads: expected a sequence of tensors, got None"),
        ({"grads": (None for _ in range(2))}, r"grads\[0\]: expected a tensor, got None"),
        ({"nesterov": "no"}, "nesterov: expected True or False, got 'no'"),
    ],
)
def test_wrong_types_are_named(change: dict, message: str) -> None:
    args = {"params": [torch.ones(2)], "grads": [torch.ones(2)], "lr": 0.1, "momentum": 0.9, **change}
    with pytest.raises(TypeError, match=message):
        metafast.sgd_update(**args)


def test_an_update_takes_generators() -> None:
    params, grads, buffers = ([torch.randn(2), torch.randn(3)] for _ in range(3))
    expected = metafast.sgd_update(params, grads, 0.1, momentum=0.9, momentum_buffers=buffers)

    def update(by: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scaled = [(by * tensor for tensor in tensors) for tensors in (params, grads, buffers)]
        return metafast.sgd_update(*scaled[:2], 0.1, momentum=0.9, momentum_buffers=scaled[2])

    torch.testing.assert_close(update(torch.tensor(1.0)), expected)
    transformed = torch.vmap(update)(torch.ones(1))
    torch.testing.assert_close(
        [tensor[0] for tensors in transformed for tensor in tensors], [*expected[0], *expected[1]]
    )


def test_update_of_nothing() -> None:
    assert metafast.sgd_update([], [], 0.1, momentum=0.9) == ([], [])
    with pytest.raises(ValueError, match="grads: expected 0 tensors"):
        metafast.sgd_update([], [torch.ones(2)], 0.1)


class CountOps(TorchDispatchMode):
    """The shapes of the first argument of each call of a product of task_conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, _, onto = func._schema.name.partition("::task_conv2d_")
        if onto:
            self.shapes.append((onto, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dims", "shapes"),
    [
        ((0, 0), [("maps", (12, 2, 3, 5, 4)), ("images", (12, 2, 2, 3, 3)), ("weight", (12, 2, 3, 5, 4))]),
        ((0, None), [("maps", (3, 8, 3, 5, 4)), ("images", (3, 8, 2, 3, 3)), ("weight", (12, 2, 3, 5, 4))]),
        ((None, 0), [("maps", (12, 2, 3, 5, 4)), ("images", (12, 2, 2, 3, 3)), ("weight", (12, 2, 3, 5, 4))]),
    ],
    ids=["own weights", "shared weights", "shared images"],
)
def test_vmap_is_one_call(dims: tuple[int | None, ...], shapes: list, backend: torch.device) -> None:
    """Among the tasks, or where the weights are shared among a task's images."""
    torch.manual_seed(0)
    sizes = (4, 3, 2, 3, 5, 4), (4, 3, 2, 3, 3, 2)
    x, weight = (
        torch.randn(s if d == 0 else s[1:], device=backend) for s, d in zip(sizes, dims, strict=True)
    )

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return metafast.task_conv2d(x, weight).sin().sum()

    with CountOps() as ops:
        found = torch.vmap(torch.func.grad(loss, (0, 1)), dims)(x, weight)
    assert sorted(ops.shapes) == sorted(shapes)
    of_each = [
        torch.func.grad(loss, (0, 1))(
            *(t if d is None else t[i] for t, d in zip((x, weight), dims, strict=True))
        )
        for i in range(4)
    ]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*of_each, strict=True))))


LAYERS = {
    "task_linear": ((2, 20, 1500), (2, 7, 1500), (2, 7)),
    "task_conv2d": ((2, 20, 8, 7, 6), (2, 5, 8, 3, 3), (2, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_16_bit_layers_round_once(name: str, dtype: torch.dtype) -> None:
    """Results and first and second derivatives, each a sum of hundreds of terms, to half a unit."""
    torch.manual_seed(0)
    layer, x, weight, bias = getattr(metafast, name), *(torch.randn(s).to(dtype) for s in LAYERS[name])
    out = layer(x, weight, bias)
    grad, *gg = (torch.randn(t.shape).to(dtype) for t in (out, x, weight, bias))
    results = []
    for of in (dtype, torch.float64):
        args = [t.to(of).requires_grad_() for t in (x, weight, bias, grad)]
        out = layer(*args[:3])
        grads = torch.autograd.grad(out, args[:3], args[3], create_graph=True)
        # Of one gradient at a time: torch adds up those of two in 16 bits.
        seconds = [
            torch.autograd.grad(grads[i], args[1 - i], gg[i].to(of), retain_graph=True)[0] for i in (0, 1)
        ]
        seconds += torch.autograd.grad(grads[2], args[3], gg[2].to(of))
        results.append([out, *grads, *seconds])
    for one, exact in zip(*results, strict=True):
        assert one.dtype == dtype
        # Half a unit in the last place, and what cancels in sums in float32.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
        assert ((one.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_autocast(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, args = getattr(metafast, name), [torch.randn(shape) for shape in LAYERS[name]]
    mixed = [args[0].to(dtype), *args[1:]]
    expected = [layer(*args).to(dtype), layer(mixed[0].float(), *args[1:]).to(dtype)]
    with torch.autocast("cpu", dtype):
        results = layer(*args), layer(*mixed)
        double = layer(*(arg.double() for arg in args))
        with pytest.raises(TypeError, match="weight: expected the dtype of x, Float, got Double"):
            layer(args[0], args[1].double(), args[2])
    assert all(map(torch.equal, results, expected))
    assert double.dtype == torch.float64
    with pytest.raises(TypeError, match=r"weight: expected the dtype of x, (Half|BFloat16), got Float"):
        layer(*mixed)
