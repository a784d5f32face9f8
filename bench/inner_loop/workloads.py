"""The tasks that the inner loop is measured on, and the arithmetic that they need."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from bench.common.cuda_graph import graphed
from metafast import reference

LEARNING_RATE = 0.01
Result = tuple[Tensor, ...]  # the loss [], and the gradients of W1 [O, I], b1 [O], W2, ...
Call = Callable[[], Result]


@dataclass(frozen=True)
class Problem:
    """T tasks for an MLP with relus: mse with one output, else cross entropy."""

    params: Sequence[Tensor]  # W1 [O, I], b1 [O], W2, ...
    support_x: Tensor  # [T, S, D]
    support_y: Tensor  # [T, S, 1], or int64 [T, S]
    query_x: Tensor  # [T, Q, D]
    query_y: Tensor  # [T, Q, 1], or int64 [T, Q]
    loss: str
    steps: int
    first_order: bool

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y

    @property
    def tasks(self) -> int:
        return self.support_x.shape[0]

    def leaves(self) -> list[Tensor]:
        return [p.detach().clone().requires_grad_() for p in self.params]

    def module(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for weight, bias in zip(self.params[::2], self.params[1::2], strict=True):
            linear = nn.Linear(*reversed(weight.shape), device=weight.device)
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss_of(self, out: Tensor, y: Tensor) -> Tensor:
        """Of one task."""
        return F.mse_loss(out, y) if self.loss == "mse" else F.cross_entropy(out, y)


def metafast_call(problem: Problem) -> Call:
    def call() -> Result:
        value, grads = metafast.maml_value_and_grad(
            problem.params,
            *problem.data,
            loss=problem.loss,
            lr=LEARNING_RATE,
            steps=problem.steps,
            first_order=problem.first_order,
        )
        return (value, *grads)

    return call


def metafast_graphed(problem: Problem) -> Call:
    return graphed(metafast_call(problem))


def metafast_through_autograd(problem: Problem) -> Call:
    leaves = problem.leaves()

    def call() -> Result:
        loss = metafast.maml_loss(
            leaves,
            *problem.data,
            loss=problem.loss,
            lr=LEARNING_RATE,
            steps=problem.steps,
            first_order=problem.first_order,
        )
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return call


def expected(problem: Problem) -> list[Tensor]:
    """The float64 reference, in parts that stay small."""
    size = sum(p.numel() for p in problem.params)
    leaves = [p.double().requires_grad_() for p in problem.params]
    part = max(1, (2**25 if leaves[0].is_cuda else 2**22) // size)
    total = [torch.zeros_like(p) for p in (leaves[0].new_zeros(()), *leaves)]
    for chunk in zip(*(t.split(part) for t in problem.data), strict=True):
        data = [t.double() if t.is_floating_point() else t for t in chunk]
        loss = reference.maml_loss(
            leaves,
            *data,
            loss=problem.loss,
            lr=LEARNING_RATE,
            steps=problem.steps,
            first_order=problem.first_order,
            reduction="none",
        ).sum()
        found = (loss.detach(), *torch.autograd.grad(loss, leaves))
        total = [t + f for t, f in zip(total, found, strict=True)]
    return [t / problem.tasks for t in total]


@dataclass(frozen=True)
class Workload:
    """T tasks of one kind, an MLP with relus, K steps."""

    kind: str
    widths: Sequence[int]  # D, hidden units ..., O
    support: int
    queries: int
    tasks: int
    steps: int = 5
    first_order: bool = False

    def __str__(self) -> str:
        order = "first" if self.first_order else "second"
        return f"{self.kind} T={self.tasks} K={self.steps} {order} order"

    @property
    def parameters(self) -> int:
        """Of one task."""
        return sum(o * (i + 1) for i, o in itertools.pairwise(self.widths))

    def problem(self, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(0)
        params = []
        for inputs, outputs in itertools.pairwise(self.widths):
            linear = nn.Linear(inputs, outputs)
            params += [linear.weight.detach(), linear.bias.detach()]
        make = _waves if self.kind == "sine" else _images
        data = make(self, generator)
        return Problem(
            [p.to(device) for p in params],
            *(t.to(device) for t in data),
            loss="mse" if self.kind == "sine" else "cross_entropy",
            steps=self.steps,
            first_order=self.first_order,
        )

    # --- floors: multiplications and additions of the matrix products -------------------------------------

    def flops(self) -> float:
        """All parameters of every task in every step."""
        first, *others = self._products()
        # Forward, gradient of the weights, and except in the first layer of the inputs. The Hessian-vector
        # product takes two for each of these; in the first layer one, because the examples do not move.
        pass_ = 2 * first + 3 * sum(others)
        product = 0 if self.first_order else 2 * first + 6 * sum(others)
        example = self.support * self.steps * (pass_ + product) + self.queries * pass_
        return 2 * self.tasks * example

    def dual_flops(self) -> float:
        """With the first layer as W1_k = W1_0 - C_k^T X, which never exists for a task: C_k [S, H].

        X W1_0^T of all examples, and the shared gradient of W1, are one product each for all tasks. A step
        reaches the first layer by the Gram matrices X X^T (symmetric) and X_query X^T alone.
        """
        first, *others = self._products()
        features, hidden = self.widths[:2]
        examples = self.support + self.queries
        gram = features * self.support * ((self.support + 1) / 2 + self.queries)
        # A step forward, and its Hessian-vector product, each multiply by X X^T; the queries by X_query X^T
        # forward and back.
        support_step = hidden * self.support**2
        query_step = hidden * self.support * self.queries
        order = 1 if self.first_order else 2
        first_layer = 2 * examples * first + gram + self.steps * order * support_step + order * query_step
        per_step = sum(others) * self.support * (3 if self.first_order else 9)
        return 2 * self.tasks * (first_layer + self.steps * per_step + 3 * self.queries * sum(others))

    def dual_pays(self) -> bool:
        return self.dual_flops() < self.flops()

    def traffic(self) -> float:
        """Bytes: the examples of all tasks are read, the parameters read and their gradient written."""
        target = 1 if self.kind == "sine" else 2  # floats
        examples = self.tasks * (self.support + self.queries) * (self.widths[0] + target)
        return 4 * (examples + 2 * self.parameters)

    def _products(self) -> list[int]:
        """Multiplications of each layer for one example."""
        return [i * o for i, o in itertools.pairwise(self.widths)]


def _waves(workload: Workload, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A sin(x + phase), as Finn et al. 2017, section 5.1."""
    uniform = functools.partial(torch.rand, generator=generator)
    amplitude = 0.1 + 4.9 * uniform(workload.tasks, 1, 1)
    phase = math.pi * uniform(workload.tasks, 1, 1)
    data = []
    for count in (workload.support, workload.queries):
        x = 10 * uniform(workload.tasks, count, 1) - 5
        data += [x, amplitude * (x + phase).sin()]
    return tuple(data)


def _images(workload: Workload, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise in place of pixels, and every class as often."""
    data = []
    for count in (workload.support, workload.queries):
        labels = torch.arange(count) % workload.widths[-1]
        data += [
            torch.rand(workload.tasks, count, workload.widths[0], generator=generator),
            labels.expand(workload.tasks, -1).contiguous(),
        ]
    return tuple(data)


# Finn et al. 2017: section 5.1, and the Omniglot network without convolutions, 5-way 1-shot, 15 queries
SINE = functools.partial(Workload, "sine", (1, 40, 40, 1), 10, 10)
MLP_784 = functools.partial(Workload, "784-MLP", (784, 256, 128, 64, 5), 5, 75)
