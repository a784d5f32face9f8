"""Backward under compiled autograd (`torch._dynamo.config.compiled_autograd`): the bits of the eager one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from parity import EVERY_ROW, ODD, cotangent, make
from rows import ROWS, Row, Sizes
from torch import Tensor, fx
from torch._dynamo import compiled_autograd

import metafast


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(row: Row, sizes: Sizes, seed: int, compiler: Callable[..., Any] | None) -> list[Tensor]:
    args = [arg.requires_grad_(i in row.differentiable) for i, arg in enumerate(make(row, sizes, seed=seed))]
    out = row.call(metafast)(*args)
    total = (torch.where(out > -torch.inf, out, 0) * cotangent(out)).sum()
    with nullcontext() if compiler is None else compiled_autograd._enable(compiler):
        total.backward()
    return [args[i].grad for i in row.differentiable]


@EVERY_ROW
def test_the_eager_gradients(row: Row) -> None:
    """As one graph records them, which runs again on other values: none is a constant in it."""
    graphs = []

    def recorded(graph: fx.GraphModule) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    for seed in range(3):
        found, expected = (gradients(row, ODD[1], seed, compiler) for compiler in (recorded, None))
        assert all(map(torch.equal, found, expected))
    assert len(graphs) == 1


@pytest.mark.parametrize("sizes", ODD, ids=str)
def test_task_conv2d_is_compiled(sizes: Sizes) -> None:
    """Its products are torch.compile's own to see, where the other ops are opaque."""
    (row,) = (row for row in ROWS if row.name == "task_conv2d")
    found = gradients(row, sizes, 0, torch.compile(backend="aot_eager", fullgraph=True))
    assert all(map(torch.equal, found, gradients(row, sizes, 0, None)))
