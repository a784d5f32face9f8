"""A module of the caller's own is an MLP if its forward runs as one, and only then."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import STEPS, make, plain, with_gradients
from torch import Tensor, nn

import metafast

FLAG = True


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.on = nn.Linear(3, 6), nn.Linear(6, 2), True


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class Parts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(self.first, nn.Tanh())

    def embed(self, x: Tensor) -> Tensor:
        return self.first(torch.flatten(x, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.last(x)


class Option(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(x) if self.on else x.tanh())


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x))) + x[:, :2]


class Chance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)) if random.random() < 2 else self.first(x))


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)) if torch.rand(1) < 2 else self.first(x))


class Global(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)) if FLAG else self.first(x))


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return self.last(F.relu(self.first(x)))


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)) if x.sum() < 1e9 else self.first(x))


@pytest.mark.parametrize("kind", [Plain, Parts, Option])
def test_a_chain_is_fused(kind: Callable[[], nn.Module]) -> None:
    _, (x, y, query_x, query_y) = make("mlp", "mse")
    module = kind().double()
    explanation = metafast.explain(module, x, loss="mse")
    assert explanation.path == "fused"
    assert f"as {kind.__name__}.forward runs" in explanation.reason
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    assert adapted.path == "fused"
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 4)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


@pytest.mark.parametrize("kind", [Residual, Chance, Draws, Global, Counts, Branches])
def test_what_may_be_another_chain_is_not(kind: Callable[[], nn.Module]) -> None:
    _, (x, *_) = make("mlp", "mse")
    explanation = metafast.explain(kind().double(), x, loss="mse")
    assert explanation.path != "fused"
    assert f"the module ({kind.__name__}) is no nn.Sequential, and" in explanation.reason


def test_options_and_hooks_are_seen() -> None:
    _, (x, y, query_x, _) = make("mlp", "mse")
    module = Option().double()
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    module.on = False
    theta = {n: p[0] for n, p in adapted.params.items()}
    torch.testing.assert_close(adapted(query_x)[0], torch.func.functional_call(module, theta, (query_x[0],)))
    again = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 4)
    torch.testing.assert_close(again(query_x), expected)
    module.register_forward_hook(lambda *_: None)
    assert metafast.explain(module, x, loss="mse").path != "fused"
