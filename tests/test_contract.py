"""The contract that every operation passes. The operations are the rows of rows.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import (
    EMPTY,
    EVERY_ROW,
    ODD,
    SMALL,
    assert_parity,
    assert_second_order_parity,
    cotangent,
    in_tf32,
    library,
    make,
    scalar,
    value_and_grads,
)
from record_ops import RecordOps
from rows import ROWS, WAY, Row, Sizes
from tolerances import TOLERANCES, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import metafast
from metafast import reference

EVERY_OP = pytest.mark.parametrize("row", {row.op: row for row in ROWS}.values(), ids=str)
TWICE = pytest.mark.parametrize("row", [row for row in ROWS if row.derivatives != 1], ids=str)
AUTOCAST = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.half or row.float32_under_autocast], ids=str
)
LEADING = pytest.mark.parametrize("row", [row for row in ROWS if row.leading], ids=str)


@pytest.fixture(autouse=True)
def _kernels_exist(request: pytest.FixtureRequest) -> None:
    """Skips what a family without CUDA kernels cannot run."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if given.get("backend") == "emulated":
        request.getfixturevalue("backend")  # loads the ops
        namespace, key = "metafast_emulated", "CPU"
    elif "gpu" in request.keywords:
        namespace, key = "metafast", "CUDA"
    else:
        return
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    if "row" in given and not has_kernel(f"{namespace}::{given['row'].op}", key):
        pytest.skip(f"{given['row'].op} has no CUDA kernel")


# --- parity with the float64 reference ------------------------------------------------------------------


@EVERY_ROW
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parity(row: Row, dtype: torch.dtype, backend: torch.device) -> None:
    args = make(row, ODD[1], dtype=dtype, device=backend)
    if dtype in (torch.float16, torch.bfloat16) and not row.half:
        with pytest.raises(TypeError, match="expected a tensor of dtype float32 or float64, got"):
            row.call(metafast)(*args)
    else:
        assert_parity(row, args, dtype)


@EVERY_ROW
@pytest.mark.parametrize("sizes", [*ODD, *EMPTY], ids=str)
def test_sizes(row: Row, sizes: Sizes, backend: torch.device) -> None:
    assert_parity(row, make(row, sizes, device=backend), torch.float64)


@EVERY_ROW
@given(data=st.data())
def test_any_size_and_labels(row: Row, data: st.DataObject) -> None:
    size = st.integers(0, 40)
    sizes = Sizes(
        tasks=data.draw(st.integers(0, 4), "T"),
        support=data.draw(st.integers(3, 20), "S"),
        query=data.draw(size, "Q"),
        features=data.draw(size, "D"),
    )
    assert_parity(row, make(row, sizes, seed=data.draw(st.integers(0, 99), "seed")), torch.float64)


@LEADING
def test_leading_dimensions(row: Row, backend: torch.device) -> None:
    args = make(row, Sizes(tasks=4), device=backend)
    batched = [i for i in range(len(args)) if i not in row.shared]
    for reshape in (lambda t: t[0], lambda t: t.unflatten(0, (2, 2)), lambda t: t.unsqueeze(1)):
        assert_parity(
            row, [reshape(arg) if i in batched else arg for i, arg in enumerate(args)], torch.float64
        )


@LEADING
def test_leading_dimensions_broadcast(row: Row, backend: torch.device) -> None:
    args = make(row, Sizes(tasks=3), device=backend)
    batched = [i for i in range(len(args)) if i not in row.shared]
    for one in batched:
        mixed = [arg[0] if i == one else arg for i, arg in enumerate(args)]
        if (
            "ways" in row.name
        ):  # the other tasks' labels must fit the first task's ways, or the other way around
            mixed = [arg[:1] if i in batched and i != one else arg for i, arg in enumerate(mixed)]
        assert_parity(row, mixed, torch.float64)


@EVERY_ROW
def test_strides(row: Row, backend: torch.device) -> None:
    args = make(row, ODD[1], device=backend)
    transposed = [arg.mT.contiguous().mT if arg.dim() > 1 else arg for arg in args]
    assert_parity(row, transposed, torch.float64)
    spaced = [torch.stack([arg, arg], -1)[..., 0] for arg in args]
    assert_parity(row, spaced, torch.float64)
    expanded = [arg if i in row.shared else arg[:1].expand(arg.shape) for i, arg in enumerate(args)]
    assert_parity(row, expanded, torch.float64)


# --- derivatives ----------------------------------------------------------------------------------------


def function_of_differentiable(
    row: Row, args: Sequence[Tensor]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(row.differentiable, tensors, strict=True))
        out = row.call(metafast)(*(given.get(i, arg) for i, arg in enumerate(args)))
        return torch.where(out > -torch.inf, out, 0.0)

    return function, [args[i].clone().requires_grad_() for i in row.differentiable]


@EVERY_ROW
def test_gradcheck(row: Row) -> None:
    function, inputs = function_of_differentiable(row, make(row))
    assert torch.autograd.gradcheck(function, inputs)


@TWICE
def test_gradgradcheck(row: Row) -> None:
    function, inputs = function_of_differentiable(row, make(row))
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, d) for row in ROWS if row.derivatives != 1 for d in TOLERANCES if row.half or d.itemsize > 2],
    ids=str,
)
def test_second_order_parity(row: Row, dtype: torch.dtype, backend: torch.device) -> None:
    assert_second_order_parity(row, make(row, ODD[1], dtype=dtype, device=backend), dtype)


@pytest.mark.parametrize("row", [row for row in ROWS if row.derivatives is not None], ids=str)
@pytest.mark.parametrize("transform", [False, True], ids=["eager", "torch.func"])
def test_one_derivative_too_many_raises(row: Row, transform: bool) -> None:
    if transform and row.transform_door == "reference":
        pytest.skip("the reference has all derivatives")
    function, inputs = function_of_differentiable(row, make(row))
    if transform:  # the first derivative by torch.func, the others by autograd
        (result,) = torch.func.grad(lambda *tensors: function(*tensors).pow(3).sum(), (0,))(*inputs)
    else:
        (result,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[:1], create_graph=True)
    for _ in range(row.derivatives - 1):
        (result,) = torch.autograd.grad(result.pow(2).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"derivatives .* metafast\.reference"):
        torch.autograd.grad(result.pow(2).sum(), inputs[:1])


@pytest.mark.parametrize("row", [row for row in ROWS if row.derivatives is None], ids=str)
def test_third_derivative(row: Row) -> None:
    thirds = []
    for module in (metafast, reference):
        args = [arg.requires_grad_(arg.is_floating_point()) for arg in make(row)]
        result = row.call(module)(*args)
        for _ in range(3):
            (result,) = torch.autograd.grad(result.pow(3).sum(), args[:1], create_graph=True)
        thirds.append(result)
    assert_close(*thirds, torch.float64)


# --- torch.library and torch.compile --------------------------------------------------------------------


@EVERY_ROW
def test_opcheck(row: Row) -> None:
    function, inputs = function_of_differentiable(row, make(row))
    with RecordOps() as record:
        function(*(x.detach() for x in inputs))  # with gradients, some ops go to their derivative at once
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        if row.derivatives != 1:
            torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    assert len(record.calls) >= row.kernels
    if row.kernels == 0:  # made of torch's own
        record.calls[getattr(torch.ops.metafast, row.op).default] = make(row)
    last = "double_backward" if row.derivatives == 2 else "_backward" if row.derivatives == 1 else None
    for op, args in record.calls.items():
        differentiable = (last is None or last not in op.name()) and "with_gradients" not in op.name()

        def fresh(arg: Any, differentiable: bool = differentiable) -> Any:
            if not isinstance(arg, Tensor) or not arg.is_floating_point():
                return arg
            return arg.detach().clone().requires_grad_(differentiable)

        torch.library.opcheck(op, tree_map(fresh, args))


@EVERY_ROW
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(row: Row, dynamic: bool) -> None:
    torch.compiler.reset()
    function = row.call(metafast)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in (SMALL, ODD[1]):
        args = make(row, sizes)
        torch.testing.assert_close(value_and_grads(row, compiled, args), value_and_grads(row, function, args))


def test_compile_with_inductor() -> None:
    torch.compiler.reset()
    row = next(row for row in ROWS if row.name == "prototypical_loss[sqeuclidean, mean]")
    function, args = row.call(metafast), make(row)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(value_and_grads(row, compiled, args), value_and_grads(row, function, args))


@EVERY_OP
def test_compile_of_a_transform(row: Row) -> None:
    torch.compiler.reset()
    grad = torch.func.grad(scalar(row.call(metafast)))
    args = make(row)
    compiled = torch.compile(grad, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), grad(*args))


# --- torch.func -----------------------------------------------------------------------------------------


def transforms(row: Row, module: Any, args: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    function, of_task, tasks = row.call(module), row.of_task(module), row.per_task(args)
    total = scalar(of_task)
    inputs = tuple(i for i in row.differentiable if i not in row.shared)
    grad = torch.func.grad(total, inputs)

    def of_squares(*args: Tensor) -> Tensor:
        return sum(grad.square().sum() for grad in torch.vmap(grad, tasks)(*args))

    def of_sum(*args: Tensor) -> Tensor:
        return torch.vmap(total, tasks)(*args).sum()

    return {
        "grad": lambda: torch.func.grad(scalar(function), row.differentiable)(*args),
        "vmap": lambda: torch.vmap(of_task, tasks)(*args),
        "vmap(grad)": lambda: torch.vmap(grad, tasks)(*args),
        "grad(vmap)": lambda: torch.func.grad(of_sum, row.differentiable)(*args),
        "grad(vmap(grad))": lambda: torch.func.grad(of_squares, row.differentiable)(*args),
    }


@EVERY_ROW
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap(grad)", "grad(vmap)", "grad(vmap(grad))"])
def test_fused_transforms(row: Row, name: str, backend: torch.device) -> None:
    args = make(row, Sizes(tasks=3), device=backend)
    expected = transforms(row, reference, args)[name]()
    with metafast.trace_doors() as doors:
        actual = transforms(row, metafast, args)[name]()
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert_close(actual, expected, torch.float64)
    too_deep = name.count("grad") > (row.derivatives or 2)
    assert set(doors) == {(row.op, "reference" if too_deep else row.transform_door)}


@EVERY_ROW
def test_vmap_over_another_dimension(row: Row) -> None:
    args = make(row, Sizes(tasks=3))
    dims = tuple(
        None if dim is None else arg.dim() - 1 for arg, dim in zip(args, row.per_task(args), strict=True)
    )
    moved = [arg if dim is None else arg.movedim(0, dim) for arg, dim in zip(args, dims, strict=True)]
    torch.testing.assert_close(
        torch.vmap(row.of_task(metafast), dims)(*moved), torch.vmap(row.of_task(reference), dims)(*moved)
    )


@EVERY_ROW
def test_vmap_with_shared_arguments(row: Row) -> None:
    if "ways" in row.name:
        pytest.skip("the labels of all tasks fit only their own ways")
    args = make(row, Sizes(tasks=3))
    for one in (i for i in range(len(args)) if i not in row.shared):
        mixed = [arg[0] if i == one else arg for i, arg in enumerate(args)]
        dims = tuple(None if i == one else dim for i, dim in enumerate(row.per_task(args)))
        actual, expected = (torch.vmap(row.of_task(module), dims)(*mixed) for module in (metafast, reference))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.shared], ids=str)
def test_vmap_of_shared_tensors_falls_to_the_reference(row: Row) -> None:
    """Or to as many tasks of their own, but for learning rates."""
    args = make(row, Sizes(tasks=3))
    own = tuple(arg.expand(3, *arg.shape) * 1.5 if i in row.shared else arg for i, arg in enumerate(args))
    grads = []
    for module in (metafast, reference):
        with metafast.trace_doors() as doors:
            grads.append(torch.vmap(torch.func.grad(scalar(row.of_task(module)), row.differentiable))(*own))
        if module is metafast:
            assert (row.op, "reference") in doors
    assert_close(*grads, torch.float64)


@EVERY_ROW
def test_jvp_and_hessian(row: Row) -> None:
    args = make(row)
    where = row.differentiable[0]

    def at(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: row.call(module)(*args[:where], x, *args[where + 1 :])

    tangent = cotangent(args[where])
    with metafast.trace_doors() as doors:
        actual = torch.func.jvp(at(metafast), (args[where],), (tangent,))
        hessian = torch.func.hessian(scalar(at(metafast)))(args[where])
    torch.testing.assert_close(actual, torch.func.jvp(at(reference), (args[where],), (tangent,)))
    torch.testing.assert_close(hessian, torch.func.hessian(scalar(at(reference)))(args[where]))
    assert set(doors) == {(row.op, "op" if row.transform_door == "op" else "reference")}


@EVERY_OP
def test_deeper_nesting_falls_to_the_reference(row: Row) -> None:
    args = make(row)

    def third(module: Any) -> Tensor:
        function = scalar(row.call(module))
        for _ in range(3):
            function = scalar(torch.func.grad(function))
        return function(*args)

    with metafast.trace_doors() as doors:
        actual = third(metafast)
    torch.testing.assert_close(actual, third(reference))
    assert doors == [(row.op, "op" if row.transform_door == "op" else "reference")]


@EVERY_OP
def test_jacobian_by_batched_gradients(row: Row) -> None:
    args = make(row)
    where = row.differentiable[0]

    def at(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: row.call(module)(*args[:where], x, *args[where + 1 :])

    actual, expected = (torch.func.jacrev(at(module))(args[where]) for module in (metafast, reference))
    torch.testing.assert_close(actual, expected)


@EVERY_OP
def test_forward_mode(row: Row) -> None:
    args = list(make(row))
    where = row.differentiable[0]
    tangents = []
    with torch.autograd.forward_ad.dual_level():
        args[where] = torch.autograd.forward_ad.make_dual(args[where], cotangent(args[where]))
        for module in (metafast, reference):
            tangents.append(torch.autograd.forward_ad.unpack_dual(row.call(module)(*args)).tangent)
    torch.testing.assert_close(*tangents)


# --- autocast, determinism, devices ---------------------------------------------------------------------


@AUTOCAST
@pytest.mark.parametrize("transform", [False, True], ids=["eager", "torch.func"])
def test_autocast(row: Row, transform: bool) -> None:
    args = make(row, ODD[1], dtype=torch.bfloat16)
    function, twin = (
        torch.vmap(row.of_task(module), row.per_task(args)) if transform else row.call(module)
        for module in (metafast, reference)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*args)
    assert out.dtype == (torch.float32 if row.float32_under_autocast else torch.bfloat16)
    expected = twin(*(arg.double() if arg.is_floating_point() else arg for arg in args))
    assert_close(out, expected, torch.float32 if row.float32_under_autocast else torch.bfloat16)


@AUTOCAST
def test_gradients_under_autocast(row: Row) -> None:
    function, inputs = function_of_differentiable(row, make(row, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*inputs).sum()
    grads = torch.autograd.grad(out, inputs)
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("row", [row for row in ROWS if row.kernels], ids=str)
def test_same_bits_for_every_number_of_threads(row: Row) -> None:
    args = make(row, Sizes(tasks=2, support=60, query=500, features=70), dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            results.append(kernel_results(row, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def kernel_results(row: Row, args: Sequence[Tensor]) -> list[Tensor]:
    """What the metafast ops of a forward and backward pass return, without torch's own ops around them."""
    with KeepResults() as keep:
        value_and_grads(row, row.call(metafast), args)
    return keep.results


class KeepResults(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "metafast":
            self.results += tree_leaves(out)
        return out


@EVERY_ROW
def test_wrong_arguments_raise_and_name_the_argument(row: Row) -> None:
    function, args = row.call(metafast), make(row)
    assert len(row.names) == len(args)

    def name_of(argument: str) -> str:
        return argument.split("[")[0]  # the tasks' tensors are in one list

    def raises(error: type[Exception], where: int, value: Tensor, expected: str) -> None:
        with pytest.raises(error, match=expected):
            function(*(value if i == where else arg for i, arg in enumerate(args)))

    # A shape may disagree with that of any other argument, and either be named.
    names = "|".join(re.escape(name_of(argument)) for argument in row.names)
    shape = rf"^(({names})(\[\d+\])?|leading dimensions): expected .*, got"
    for i, (arg, argument) in enumerate(zip(args, row.names, strict=True)):
        # The first tensor is what the others are compared with: "y: expected the dtype of x, ..."
        name = rf"(?<!\w){name_of(argument)}(?!\w)"
        both = rf"(?s)(?=.*{name}).*expected "
        raises(TypeError, i, arg.int() if arg.is_floating_point() else arg.float(), f"{both}.*dtype")
        raises(ValueError, i, arg.to("meta"), f"{both}a tensor on the device of")
        raises(ValueError, i, torch.cat([arg, arg[:1]]) if arg.dim() else arg.expand(2), shape)
        if arg.dim() > 1:
            raises(ValueError, i, arg.flatten()[:1], shape)


LABELS = pytest.mark.parametrize("row", [row for row in ROWS if row.labels], ids=str)
# How a call comes to each of its doors, and to the reference with labels that torch.func has wrapped.
TO_THE_DOORS: dict[str, Callable[..., Any]] = {
    "op": lambda row, args: row.call(metafast)(*args),
    "function": lambda row, args: torch.func.grad(scalar(row.call(metafast)))(*args),
    "function, vmap": lambda row, args: torch.vmap(row.of_task(metafast), row.per_task(args))(*args),
    "reference": lambda row, args: _jvp(row, row.call(metafast), args),
    "reference, jvp of vmap": lambda row, args: _jvp(
        row, torch.vmap(row.of_task(metafast), row.per_task(args)), args
    ),
    "reference, vmap of jvp": lambda row, args: torch.vmap(
        lambda *task: _jvp(row, row.of_task(metafast), task), row.per_task(args)
    )(*args),
}


def _jvp(row: Row, function: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    where = row.differentiable[0]
    one = args[where]
    return torch.func.jvp(lambda x: function(*args[:where], x, *args[where + 1 :]), (one,), (one,))


@LABELS
@pytest.mark.parametrize("door", TO_THE_DOORS)
def test_wrong_labels_raise_and_name_the_argument(row: Row, door: str) -> None:
    args = make(row)
    TO_THE_DOORS[door](row, args)

    def raises(where: int, labels: Tensor, message: str) -> None:
        changed = [labels if i == where else arg for i, arg in enumerate(args)]
        with (
            metafast.trace_doors() as doors,
            pytest.raises(ValueError, match=f"{row.names[where]}: {message}"),
        ):
            TO_THE_DOORS[door](row, changed)
        by = row.transform_door if door.startswith("function") else door.split(",")[0]
        assert {taken for _, taken in doors} == {by}

    for where in row.labels:
        for label in (WAY, -1, -7):
            labels = args[where].clone()
            labels[1, 2] = label
            expected = rf"expected classes in \[0, {WAY}\) or -100 \(ignored\)"
            raises(where, labels, f"{expected}, got {label} at position 2 of task 1")
    for where in row.complete:
        labels = torch.where(args[where] == 1, 0, args[where])
        labels[0] = args[where][0]
        raises(where, labels, "expected a support example of every class, got none of class 1 in task 1")


@LABELS
def test_wrong_labels_in_a_compiled_transform(row: Row) -> None:
    torch.compiler.reset()
    args = make(row)
    compiled = torch.compile(
        lambda *args: torch.vmap(torch.func.grad(scalar(row.of_task(metafast))), row.per_task(args))(*args),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(*args)
    for where in row.labels:
        labels = torch.full_like(args[where], WAY)
        with pytest.raises(RuntimeError, match=f"{row.names[where]}: expected classes"):
            compiled(*(labels if i == where else arg for i, arg in enumerate(args)))


@pytest.mark.gpu
@EVERY_ROW
def test_runs_on_the_current_stream(row: Row) -> None:
    args = make(row, ODD[2], dtype=torch.float32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream overtakes these copies
        late = [torch.zeros_like(arg).copy_(arg) for arg in args]
        actual = value_and_grads(row, row.call(metafast), late)
    stream.synchronize()
    torch.testing.assert_close(actual, value_and_grads(row, row.call(metafast), args), rtol=0, atol=0)


@pytest.mark.gpu
@EVERY_ROW
def test_cuda_graph(row: Row) -> None:
    """Forward and backward, captured once and replayed with other values in the same tensors."""
    args = [arg.detach() for arg in make(row, ODD[1], dtype=torch.float32, device="cuda")]
    other = make(row, ODD[1], seed=1, dtype=torch.float32, device="cuda")
    expected = value_and_grads(row, row.call(metafast), other)
    grad = cotangent(expected[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_grads(row, row.call(metafast), args, grad)  # what is done once is not to be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = value_and_grads(
            row, row.call(metafast), args, grad
        )  # detached, they share the memory of args
    for arg, value in zip(args, other, strict=True):
        arg.copy_(value)
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# torch's switches of what a float32 product is on a GPU: the new one of each library, and the older one.
SWITCHES = {
    ("cuda.matmul", "new"): lambda tf32: setattr(
        torch.backends.cuda.matmul, "fp32_precision", "tf32" if tf32 else "ieee"
    ),
    ("cuda.matmul", "old"): lambda tf32: setattr(torch.backends.cuda.matmul, "allow_tf32", tf32),
    ("cudnn.conv", "new"): lambda tf32: setattr(
        torch.backends.cudnn.conv, "fp32_precision", "tf32" if tf32 else "ieee"
    ),
    ("cudnn.conv", "old"): lambda tf32: setattr(torch.backends.cudnn, "allow_tf32", tf32),
}


@pytest.mark.parametrize("row", [row for row in ROWS if row.library], ids=str)
@pytest.mark.parametrize("switch", ["new", "old"])
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float32_is_what_the_switch_of_the_library_says(
    row: Row, switch: str, tf32: bool, device: str
) -> None:
    """The tolerance is that of the switch: see parity.tolerance. On the CPU it changes nothing."""
    libraries = [library(name) for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")]  # the old one has two
    before = [library.fp32_precision for library in libraries]
    args = make(row, ODD[1], dtype=torch.float32, device=device)
    try:
        SWITCHES[row.library, switch](tf32)
        assert in_tf32(row.library) == tf32
        assert_parity(row, args, torch.float32)
        assert_second_order_parity(row, args, torch.float32)
    finally:
        for one, precision in zip(libraries, before, strict=True):
            one.fp32_precision = precision


@pytest.mark.gpu
def test_more_elements_than_int32_holds() -> None:
    x = torch.randn(50_000, 2, device="cuda")
    out = metafast.pairwise_distance(x, x, "cityblock")
    assert out.numel() > 2**31
    torch.testing.assert_close(out[-1], (x - x[-1]).abs().sum(-1))
