"""Episodes of random embeddings, and the arithmetic and bytes that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_PER_CLASS = 15
HIDDEN = 64  # of the relation head
CHECKED_TASKS = 16  # the gradients of so many tasks are compared with the reference; the loss is that of all


@dataclass(frozen=True)
class Size:
    tasks: int
    way: int
    shot: int
    features: int

    def __str__(self) -> str:
        return f"{self.tasks} x {self.way}-way {self.shot}-shot D={self.features}"

    @property
    def support(self) -> int:
        return self.way * self.shot

    @property
    def queries(self) -> int:
        return self.way * QUERIES_PER_CLASS

    @property
    def embeddings(self) -> int:
        return self.tasks * (self.support + self.queries) * self.features

    @property
    def pairs(self) -> int:
        return self.tasks * self.queries * self.way

    def traffic(self, backward: bool) -> float:
        """Embeddings are read, and their gradients written, once."""
        return 4 * self.embeddings * (2 if backward else 1) + 8 * self.embeddings / self.features

    def prototypical_flops(self, backward: bool) -> float:
        """Means, class norms, and one matrix product forward, two backward."""
        means_and_norms = self.tasks * self.features * (self.support + 2 * self.way)
        return (means_and_norms + 2 * self.pairs * self.features) * (1 if not backward else 3)

    def matching_flops(self, backward: bool) -> float:
        products = self.tasks * self.queries * self.support * self.features
        return (2 * products + 2 * self.embeddings) * (1 if not backward else 3)

    def relation_flops(self, backward: bool) -> float:
        """The split first layer, then per pair and hidden unit: add, relu, multiply, add; backward again the
        first two, multiply and add for the weight, one addition for the query and one for the class."""
        layer = 2 * self.tasks * (self.queries + self.way) * self.features * HIDDEN
        hidden = self.pairs * HIDDEN
        return 3 * layer + 10 * hidden if backward else layer + 4 * hidden


class Episodes:
    """Random embeddings of `size`. A single task has no task dimension, as people write it."""

    def __init__(self, size: Size, device: torch.device) -> None:
        lead = (size.tasks,) if size.tasks > 1 else ()
        scale = size.features**-0.5  # distances of about 2: no saturated softmax, all gradients count
        self.size = size
        self.support = torch.randn(*lead, size.support, size.features, device=device) * scale
        self.query = torch.randn(*lead, size.queries, size.features, device=device) * scale
        classes = torch.arange(size.way, device=device)
        self.support_labels = classes.repeat_interleave(size.shot).expand(*lead, -1).contiguous()
        self.query_labels = classes.repeat(QUERIES_PER_CLASS).expand(*lead, -1).contiguous()
        self.targets = F.one_hot(self.query_labels, size.way).float()

    def head(self) -> tuple[Tensor, ...]:
        """weight [H, 2 D], bias [H], out_weight [1, H], out_bias [1]"""
        first, last = torch.nn.Linear(2 * self.size.features, HIDDEN), torch.nn.Linear(HIDDEN, 1)
        parameters = (first.weight, first.bias, last.weight, last.bias)
        return tuple(p.detach().to(self.support.device) for p in parameters)

    def per_task(self, tensor: Tensor) -> Tensor:
        return tensor if self.size.tasks > 1 else tensor.unsqueeze(0)

    def collect(self, result: Sequence[Tensor]) -> list[Tensor]:
        """(loss, grad_support, grad_query, grads of the head ...) -> the same, as far as it is checked."""
        loss, *grads = (torch.as_tensor(r) for r in result)
        return [loss, *(self.per_task(g)[:CHECKED_TASKS] for g in grads[:2]), *grads[2:]]

    def expected(
        self, loss_of: Callable[..., Tensor], targets: Tensor, shared: Sequence[Tensor], backward: bool
    ) -> list[Tensor]:
        """What `collect` returns, of the float64 reference; `loss_of` has to be a sum over queries."""
        tasks = self.size.tasks
        support, query, labels, target = map(
            self.per_task, (self.support, self.query, self.support_labels, targets)
        )
        largest = 2**28 if support.is_cuda else 2**22  # elements of [T, Q, N, D]
        chunk = max(1, min(CHECKED_TASKS, tasks * largest // (self.size.pairs * self.size.features)))
        loss, grads, shared_grads = 0.0, [], [torch.zeros_like(p, dtype=torch.float64) for p in shared]
        for begin in range(0, tasks, chunk):
            part = slice(begin, begin + chunk)
            needs_grad = backward and (bool(shared) or begin < CHECKED_TASKS)
            leaves = [t.double().requires_grad_(needs_grad) for t in (support[part], query[part], *shared)]
            part_loss = loss_of(leaves[0], labels[part], leaves[1], target[part], *leaves[2:])
            loss += part_loss.detach()
            if needs_grad:
                task_grads = torch.autograd.grad(part_loss, leaves)
                grads.append(task_grads[:2])
                shared_grads = [total + g for total, g in zip(shared_grads, task_grads[2:], strict=True)]
        collected = [torch.cat(g)[:CHECKED_TASKS] for g in zip(*grads, strict=True)]
        return [t / target.numel() for t in (loss, *collected, *(shared_grads if backward else ()))]
