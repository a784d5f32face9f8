"""A row of the contract against its float64 reference: arguments, results, first and second derivatives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rows import ROWS, Row, Sizes
from tolerances import TF32, assert_close
from torch import Tensor

import metafast
from metafast import reference

EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=str)
SMALL = Sizes()
ODD = (
    Sizes(tasks=1, support=3, query=1, features=1),
    Sizes(tasks=4, support=9, query=5, features=17),
    Sizes(tasks=2, support=40, query=70, features=129),
)
EMPTY = (Sizes(tasks=0), Sizes(query=0), Sizes(features=0))


def make(
    row: Row, sizes: Sizes = SMALL, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> tuple[Tensor, ...]:
    args = row.make(sizes, torch.Generator().manual_seed(seed))
    return tuple(arg.to(device=device, dtype=dtype if arg.is_floating_point() else None) for arg in args)


def cotangent(out: Tensor) -> Tensor:
    """Some gradient of a result: the same for every dtype and device."""
    values = torch.linspace(-1, 1, out.numel() + 2, dtype=torch.float64)[1:-1].view(out.shape)
    return values.to(torch.bfloat16).to(out)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with a nonlinear scalar result, 32 bits at least; absent classes (-inf) count nothing."""

    def of_finite(*args: Tensor) -> Tensor:
        out = function(*args)
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        return torch.where(wide > -torch.inf, wide, 0.0).square().sum()

    return of_finite


def value_and_grads(
    row: Row, function: Callable[..., Tensor], args: Sequence[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """`grad` is the cotangent; it comes from the CPU, which a CUDA graph cannot capture."""
    args = [arg.detach().requires_grad_(i in row.differentiable) for i, arg in enumerate(args)]
    out = function(*args)
    grads = torch.autograd.grad(
        out, [args[i] for i in row.differentiable], cotangent(out) if grad is None else grad
    )
    return [out.detach(), *grads]


def second_order(row: Row, function: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    args = [arg.detach().requires_grad_(i in row.differentiable) for i, arg in enumerate(args)]
    wrt = [args[i] for i in row.differentiable]
    grads = torch.autograd.grad(scalar(function)(*args), wrt, create_graph=True)
    total = sum((grad * cotangent(grad)).sum() for grad in grads)
    return torch.autograd.grad(total, wrt)


def tolerance(row: Row, args: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype | tuple[float, float]:
    """That of the dtype or, where torch's switch says so for the library that computes the row, of TF32."""
    if dtype == torch.float32 and args[0].is_cuda and row.library and in_tf32(row.library):
        return TF32
    return dtype


def library(name: str) -> Any:
    """torch.backends.<name>, which has the switch `fp32_precision`."""
    return operator.attrgetter(name)(torch.backends)


def in_tf32(name: str) -> bool:
    return library(name).fp32_precision == "tf32"


def assert_parity(row: Row, args: Sequence[Tensor], dtype: torch.dtype) -> None:
    actual = value_and_grads(row, row.call(metafast), args)
    assert all(tensor.dtype == dtype for tensor in actual)
    wide = [arg.double().cpu() if arg.is_floating_point() else arg.cpu() for arg in args]
    expected = value_and_grads(row, row.call(reference), wide)
    assert_close(actual, expected, tolerance(row, args, dtype))


def assert_second_order_parity(row: Row, args: Sequence[Tensor], dtype: torch.dtype) -> None:
    wide = [arg.double().cpu() if arg.is_floating_point() else arg.cpu() for arg in args]
    actual = second_order(row, row.call(metafast), args)
    expected = second_order(row, row.call(reference), wide)
    scale = max(1.0, *(tensor.abs().max().item() for tensor in expected))  # sums of large terms of both signs
    within = tolerance(row, args, dtype)
    assert_close([t / scale for t in actual], [t / scale for t in expected], within)
