"""Data parallel over tasks: the processes that torchrun started, each a rank, share the tasks of every batch.

Every rank draws the batch and learns from its share; the gradients are averaged, so that all take the step
that one process would take. The first rank alone writes, and says what is to be said.

- A task counts once, however many a rank has: gradients are weighted by the tasks that did not diverge.
- Batch norm in training sees a rank's own tasks; its running statistics are the first rank's, as all buffers
  are, and as in DistributedDataParallel.
- The first rank draws random numbers as one process does, and checkpoints keep their state; any other is
  seeded anew in every step, by the run's seed, the step and its rank. So a run resumes bit for bit on as many
  ranks, and on another number it goes on from the same state.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metafast.data import Episodes, Optimizees
from metafast.data.sampling import random_bits

Batch = TypeVar("Batch", Episodes, Optimizees)
T = TypeVar("T")

_ENDED = "ended"  # in the store: how many ranks have ended with an error


@dataclass(frozen=True)
class Outcome:
    """Of a step's tasks.

    Attributes:
        loss: its mean over those that did not diverge.
        tasks: how many these are.
        diverged: how many did.
    """

    loss: float
    tasks: int
    diverged: int


class Ranks:
    """All processes that train together, as one of them sees them: here it is the only one.

    Attributes:
        rank: of this process, 0 the first.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def of_first(self, look: Callable[[], T]) -> T:
        """What the first rank finds, which alone looks."""
        return look()

    def begin(self, module: nn.Module) -> None:
        """Gives the first rank's weights to all, and to each random numbers of its own."""

    def share(self, batch: Batch) -> Batch:
        """This rank's tasks of a batch.

        Raises:
            ValueError: there are fewer than ranks.
        """
        return batch

    def seed(self, step: int) -> None:
        """Seeds this rank's random numbers for a step."""

    def combine(self, outcome: Outcome, parameters: Sequence[Tensor]) -> Outcome:
        """The outcome over the tasks of all ranks, whose mean gradient it leaves in the parameters."""
        return outcome

    def share_buffers(self, module: nn.Module) -> None:
        """Gives the first rank's buffers to all."""

    def mean(self, value: float, tasks: int) -> float:
        """The mean over all tasks, of a mean over ``tasks`` of this rank."""
        return value

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number


class _Together(Ranks):
    """Ranks in a process group. What each is asked for, all are asked for in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._seed = 0

    def of_first(self, look: Callable[[], T]) -> T:
        found = [look() if self.first else None]
        with _heard_of():
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    def begin(self, module: nn.Module) -> None:
        self._from_first([*module.parameters(), *module.buffers()])
        self._seed = self.of_first(torch.initial_seed)

    def share(self, batch: Batch) -> Batch:
        tasks = len(batch)
        if tasks < self.size:
            raise ValueError(f"tasks: expected at least {self.size}, one for each rank, got {tasks}")
        return batch.take(slice(self.rank * tasks // self.size, (self.rank + 1) * tasks // self.size))

    def seed(self, step: int) -> None:
        if not self.first:
            torch.manual_seed(int(random_bits(self._seed, step, (self.size,), "cpu")[self.rank]))

    def combine(self, outcome: Outcome, parameters: Sequence[Tensor]) -> Outcome:
        counts = outcome.tasks > 0
        total = outcome.tasks * outcome.loss if counts else 0.0
        has_gradient = [counts and parameter.grad is not None for parameter in parameters]
        total, tasks, diverged, *having = self._sum([total, outcome.tasks, outcome.diverged, *has_gradient])
        if tasks == 0:
            return Outcome(math.nan, 0, int(diverged))
        gradients = []
        for parameter, here, anywhere in zip(parameters, has_gradient, having, strict=True):
            if not here:
                parameter.grad = torch.zeros_like(parameter) if anywhere else None
            if anywhere:
                gradients.append(parameter.grad)
        weight = outcome.tasks / tasks
        _as_one(gradients, lambda flat: dist.all_reduce(flat.mul_(weight)))
        return Outcome(total / tasks, int(tasks), int(diverged))

    def share_buffers(self, module: nn.Module) -> None:
        self._from_first(list(module.buffers()))

    def mean(self, value: float, tasks: int) -> float:
        total, tasks = self._sum([tasks * value, tasks])
        return total / tasks

    def largest(self, number: int) -> int:
        numbers = torch.tensor(number)
        with _heard_of():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def _sum(self, values: Iterable[float]) -> list[float]:
        """Over the ranks, each by itself."""
        numbers = torch.tensor(list(values), dtype=torch.float64)
        with _heard_of():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def _from_first(self, tensors: Sequence[Tensor]) -> None:
        _as_one(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _as_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchanges the contents of all tensors of a dtype in one call."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype, tensor.device].append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _heard_of():
            exchange(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def _heard_of() -> Iterator[None]:
    """Within it the ranks wait for each other."""
    try:
        yield
    except RuntimeError as error:  # of gloo or NCCL: a connection is closed
        raise ConnectionError(
            "another rank has ended, and so does this training; --resume goes on after the last checkpoint, "
            "on any number of ranks"
        ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, of which this process is one; without torchrun it is the only one.

    An error ends all ranks, and is told once: the first rank to meet one raises it, the others, whose error
    is the same or follows from it, exit with its status and say nothing.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield Ranks()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(_backend(), store=dist.PrefixStore("ranks", store), rank=rank, world_size=size)
    try:
        yield _Together()
    except Exception as error:
        if not _is_first_error(store):
            raise SystemExit(getattr(error, "status", 1)) from None
        raise
    dist.destroy_process_group()


def _is_first_error(store: dist.Store) -> bool:
    try:
        return store.add(_ENDED, 1) == 1
    except RuntimeError:  # the store was the first rank's, and has ended with it
        return True


def _backend() -> str:
    """gloo on the CPU and, where each rank of this machine has a GPU, NCCL on these."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return "gloo"
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local % gpus)
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus  # which NCCL refuses
    return "cpu:gloo,cuda:gloo" if shared else "cpu:gloo,cuda:nccl"
