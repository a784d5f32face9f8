"""What torch.func does not take: named by the error and by explain, and adapted by path="loop"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import STEPS, plain, with_gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import metafast


class Net(nn.Module):
    """A layer that torch.func does not take, between two that it does."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(3, 4), odd, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(torch.tanh(self.first(x))))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x * 3


class Fills(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[x.detach() > 0] = 1.0
        out[:, 0] = x[:, 0]
        return out + x


class Routes(nn.Module):
    """A mixture of experts, by the number of the best."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum(0).argmax()) % 2](x) + F.one_hot(x.argmax(1), 4)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


class Recomputes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.recomputes = nn.Linear(4, 4), True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False) if self.recomputes else self.layer(x)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x), 0, -1)
        packed = pack_padded_sequence(x.unsqueeze(1).expand(-1, len(x), -1), lengths, batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0][:, 0]


ODD = {
    "a branch on a value": Branches,
    "zeros, then filled": Fills,
    "one_hot and a chosen expert": Routes,
    "an autograd.Function of the old style": Cubes,
    "checkpoint": Recomputes,
    "packed sequences": Packs,
    "batch norm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("name", ODD)
def test_odd_modules(name: str, first_order: bool) -> None:
    torch.manual_seed(0)
    module = Net(ODD[name]()).double()
    x, y, query_x, query_y = (torch.randn(3, 4, n, dtype=torch.float64) for n in (3, 2, 3, 2))
    state = {n: t.clone() for n, t in module.state_dict().items()}
    adapted = metafast.adapt(
        module, x, y, loss="mse", lr=0.1, steps=STEPS, first_order=first_order, path="loop"
    )
    out = adapted(query_x)
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    leaves = list(module.parameters())
    found = with_gradients(out, query_y, "mse", leaves)
    rates = [0.1] * len(leaves)
    module.odd.recomputes = False  # functional_call would have put other parameters into it by then
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=rates, first_order=first_order)
    torch.testing.assert_close(found, with_gradients(expected, query_y, "mse", leaves))


@pytest.mark.parametrize("name", [n for n in ODD if n not in ("checkpoint", "spectral norm")])
def test_the_layer_is_named(name: str) -> None:
    module = Net(ODD[name]())
    x, y = torch.randn(3, 4, 3), torch.randn(3, 4, 2)
    layer = "'odd.rnn' .GRU|'odd'" if name == "packed sequences" else f"'odd' .{type(module.odd).__name__}"
    with pytest.raises(
        ValueError, match=f"path: 'torch.func' does not take layer ({layer})(.|\n)*path='loop'"
    ):
        metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=1, path="torch.func")
    explanation = metafast.explain(module, x, loss="mse")
    assert list(explanation.refused) == ["torch.func"]
    assert "path='loop'" in explanation.reason
    assert "not torch.func: path: 'torch.func'" in str(explanation)


def test_script_modules() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    script = torch.jit.script(eager)
    x, y, query_x = (torch.randn(3, 4, n, dtype=torch.float64) for n in (3, 2, 3))
    outputs = [
        metafast.adapt(m, x, y, loss="mse", lr=0.1, steps=STEPS, path="loop")(query_x)
        for m in (script, eager)
    ]
    grads = [torch.autograd.grad(out.square().sum(), list(eager.parameters())) for out in outputs[1:]]
    found = torch.autograd.grad(outputs[0].square().sum(), list(script.parameters()))
    torch.testing.assert_close([outputs[0], *found], [outputs[1], *grads[0]])


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_saved_tensor_hooks_around_adapt(around: str) -> None:
    module = Net(nn.GELU())
    x, y = torch.randn(3, 4, 3), torch.randn(3, 4, 2)

    def outputs(path: str) -> Tensor:
        return metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path=path)(x)

    def run(path: str) -> Tensor:
        if around == "checkpoint":
            return checkpoint(outputs, path, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            return outputs(path)

    with pytest.raises(ValueError, match=r"path: 'torch.func' does not take(.|\n)*path='loop'"):
        run("torch.func")
    (found,) = torch.autograd.grad(run("loop").square().sum(), module.first.weight)
    (expected,) = torch.autograd.grad(outputs("loop").square().sum(), module.first.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_that_vmap_knows_below_grad_only(cell: type[nn.Module]) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.cell(x)
            return out[0] if isinstance(out, tuple) else out

    torch.manual_seed(0)
    module = Net(Cell()).double()
    x, y, query_x = (torch.randn(3, 4, n, dtype=torch.float64) for n in (3, 2, 3))
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, path="torch.func")
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 8)
    torch.testing.assert_close(adapted(query_x), expected)
    with torch.no_grad():
        torch.testing.assert_close(adapted(query_x), expected)
