"""Modules and data for the tests of adapt, and the plain loop of torch.autograd.grad that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TASKS, SHOTS, QUERIES, STEPS = 3, 4, 5, 2
LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Tied(nn.Module):
    """Two layers of one weight, and a buffer that is no statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def nested() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Sequential(layers, nn.Linear(5, 2)), nn.Identity())


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3, affine=False, momentum=0.3),
        nn.GELU(),
        nn.Linear(3, 2),
    )


def embedded() -> nn.Module:
    """A body that the fused path takes, where it does not adapt."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2)
    )


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of an example
    "mlp": (mlp, (3,)),
    "nested": (nested, (2, 3)),
    "conv with batch norm": (conv, (1, 6, 6)),
    "normed": (normed, (1, 6, 6)),
    "embedded": (embedded, (1, 6, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 3)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 3)),
    "attention": (Attention, (5, 4)),
    "tied": (Tied, (3,)),
}


def make(name: str, loss: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    """The module, and support x, support y, query x, query y."""
    torch.manual_seed(0)
    of, shape = MODULES[name]
    module = of().to(dtype)
    outputs = 3 if name == "tied" else 2
    data: list[Tensor] = []
    for count in (SHOTS, QUERIES):
        data.append(torch.randn(TASKS, count, *shape, dtype=dtype).requires_grad_())
        if loss == "cross_entropy":
            data.append(torch.randint(0, outputs, (TASKS, count)))
        else:
            data.append(torch.randn(TASKS, count, outputs, dtype=dtype).requires_grad_())
    return module, data


def plain(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    query_x: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    lr: Sequence[Any],
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Each task's outputs for its queries, and its buffers; `lr` is one for each parameter that adapts."""
    functional_call = sdpa_kernel(SDPBackend.MATH)(torch.func.functional_call)
    outputs, buffers_of_tasks = [], []
    for t in range(len(x)):
        theta = {n: p for n, p in module.named_parameters() if names is None or n in names}
        buffers = dict(module.named_buffers())
        momenta: list[Tensor] | None = None
        for _ in range(STEPS):
            buffers = {n: b.clone() for n, b in buffers.items()}
            value = loss(functional_call(module, {**theta, **buffers}, (x[t],)), y[t])
            grads = torch.autograd.grad(
                value,
                list(theta.values()),
                create_graph=not first_order,
                allow_unused=True,
                materialize_grads=True,
            )
            grads = [g + weight_decay * p for g, p in zip(grads, theta.values(), strict=True)]
            momenta = (
                grads if momenta is None else [momentum * m + g for m, g in zip(momenta, grads, strict=True)]
            )
            moves = [g + momentum * m for g, m in zip(grads, momenta, strict=True)] if nesterov else momenta
            theta = {n: p - r * g for (n, p), r, g in zip(theta.items(), lr, moves, strict=True)}
        buffers_of_tasks.append(buffers)
        copies = {n: b.clone() for n, b in buffers.items()}
        outputs.append(functional_call(module, {**theta, **copies}, (query_x[t],)))
    return torch.stack(outputs), buffers_of_tasks


def with_gradients(outputs: Tensor, query_y: Tensor, loss: str, leaves: Sequence[Tensor]) -> list[Tensor]:
    flat = outputs.flatten(0, 1), query_y.flatten(0, 1)
    grads = torch.autograd.grad(LOSSES[loss](*flat), leaves, allow_unused=True)
    return [outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]
