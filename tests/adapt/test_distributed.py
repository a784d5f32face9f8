"""DistributedDataParallel, in one process: a method wrapped by it, and adapt of what it wraps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapt_problems import conv, make
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metafast
from metafast.data import Episodes
from metafast.methods import MAML


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("path", ["torch.func", "loop"])
@pytest.mark.usefixtures("group")
def test_adapt_of_a_wrapped_network_with_batch_norm(path: str) -> None:
    torch.manual_seed(0)
    module, (x, y, query_x, _) = conv().double(), make("conv with batch norm", "mse")[1]
    options = {"loss": "mse", "lr": 0.1, "steps": 2, "path": path}
    found = metafast.adapt(DistributedDataParallel(module), x, y, **options)(query_x)
    torch.testing.assert_close(found, metafast.adapt(module, x, y, **options)(query_x))


@pytest.mark.usefixtures("group")
def test_a_wrapped_method() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    method = MAML(network, loss="mse", lr=0.1, steps=1)
    x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
    episodes = Episodes(x, y, x, y)
    wrapped = DistributedDataParallel(method)(episodes)
    torch.testing.assert_close(wrapped, method.loss(episodes))
    wrapped.backward()
    assert all(p.grad is not None for p in network.parameters())
