"""Steps of training: one by one, as they are written, or as a graph that the device takes again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metafast.data import Episodes, Optimizees
from metafast.program.capture import CapturedStep, CudaGraphs, Graphs, NotCapturable, Rates
from metafast.program.distributed import Outcome, Ranks

Batch = Episodes | Optimizees
Graph = Literal["auto", "on", "off"]

_WINDOW = 100  # steps at most before the device is waited for: so late may a signal be heard


@dataclass(frozen=True, eq=False)
class Taken:
    """The steps that were taken in one go.

    Attributes:
        done: how many are done since the training began.
        batch, loss, lr: of the last.
        tasks: of all of them together.
    """

    done: int
    batch: Batch
    loss: float
    lr: float
    tasks: int


class Steps:
    """Takes one step at a time, as it is written.

    Args:
        loss: of a batch, in the precision of the training.
        note: writes a record of the log.
        rated: does the optimizer read its learning rates where a graph reads them? On CUDA it always does, so
            that the weights have the same bits with a graph and without.
        others: as :func:`metafast.program.train.train`'s.
    """

    def __init__(
        self,
        method: nn.Module,
        loss: Callable[[Batch], Tensor],
        batches: Callable[[int], Batch],
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        ranks: Ranks,
        note: Callable[..., None],
        *,
        rated: bool,
    ) -> None:
        self.method = method
        self.batches = batches
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._loss = loss
        self._ranks = ranks
        self._note = note
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self._parameters[0].device
        self._rates = Rates(optimizer, self.device) if rated else None

    def take(self, done: int) -> Taken:
        """Takes the step after ``done`` steps.

        Raises:
            FloatingPointError: no task of its batch has a finite loss and gradient; it is not taken.
        """
        ranks = self._ranks
        episodes = ranks.share(self.batches(done))
        ranks.seed(done)
        done += 1
        outcome = ranks.combine(self._gradient(episodes), self._parameters)
        if outcome.tasks == 0:
            self._note(step=done, diverged=outcome.diverged, error="no task has a finite loss and gradient")
            raise FloatingPointError(f"the loss of step {done} is {outcome.loss}: training stopped before it")
        if outcome.diverged:
            self._note(step=done, diverged=outcome.diverged)
        lr = self.set_rates()
        self.update()
        if self.scheduler is not None:
            self.scheduler.step()
        ranks.share_buffers(self.method)
        return Taken(done, episodes, outcome.loss, lr, outcome.tasks + outcome.diverged)

    def set_rates(self) -> float:
        """Makes the learning rates those of the next step; gives the first."""
        if self._rates is not None:
            self._rates.set()
        return self.optimizer.param_groups[0]["lr"]

    def gradient(self, episodes: Batch) -> Tensor:
        """The loss, whose gradient it leaves in the parameters, and the norms of its parts: [1 + P]."""
        for parameter in self._parameters:
            parameter.grad = None
        value = self._loss(episodes)
        value.backward()
        norms = torch._foreach_norm([each.grad for each in self._parameters if each.grad is not None])
        return torch.stack([value.detach(), *norms])

    def update(self) -> None:
        """The optimizer's step, by the gradients that are there."""
        with nullcontext() if self._rates is None else self._rates.applied():
            self.optimizer.step()

    def _gradient(self, episodes: Batch) -> Outcome:
        """Leaves the gradient of the mean loss over the tasks that did not diverge."""
        value, tasks = self._finite(episodes), len(episodes)
        if math.isfinite(value):
            return Outcome(value, tasks, 0)
        singles = (episodes.take(slice(task, task + 1)) for task in range(tasks))
        finite = [math.isfinite(self._finite(single)) for single in singles]
        if any(finite):
            value = self._finite(episodes.take(torch.tensor(finite)))
        counted = sum(finite) if math.isfinite(value) else 0
        return Outcome(value, counted, tasks - counted)

    def _finite(self, episodes: Batch) -> float:
        """:meth:`gradient`'s loss; not finite where it or the gradient is not."""
        figures = self.gradient(episodes).tolist()  # one wait for the device
        return figures[0] if all(map(math.isfinite, figures)) else math.nan


class CapturedSteps:
    """Takes the steps up to the next look at the device in one go, without waiting for it.

    Where a loss or gradient on the way is not finite, it goes back and takes them one by one, as it does from
    there on where a step cannot be captured.

    Args:
        steps: as they are written.
        graphs: what records a step.
        every: multiples after which the device is looked at.
        last: so is it after so many steps.
        stop: and where this says so.
        needed: is a step that cannot be captured an error?
        tell: hears why a step cannot be.
    """

    def __init__(
        self,
        steps: Steps,
        graphs: Graphs,
        *,
        every: Sequence[int],
        last: int,
        stop: Callable[[], bool],
        needed: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._steps = steps
        self._graphs = graphs
        self._every = every
        self._last = last
        self._stop = stop
        self._needed = needed
        self._tell = tell
        self._captured = self._fresh()
        self._singly_until = 0

    def take(self, done: int) -> Taken:
        """Takes steps after ``done`` steps, one at least.

        Raises:
            ValueError: they cannot be captured, and are to be.
            FloatingPointError: as :meth:`Steps.take`.
        """
        if done < self._singly_until:
            return self._steps.take(done)
        before = _State(self._steps)
        until = min(self._last, done + _WINDOW, *(done - done % every + every for every in self._every))
        try:
            taken = self._run(done, until)
        except NotCapturable as why:
            if self._needed:
                raise ValueError(
                    f"graph: expected auto or off for a step that cannot be captured: {why}"
                ) from None
            self._tell(f"without a CUDA graph, as a step cannot be captured: {why}")
            until, taken = self._last, None
        if taken is not None:
            return taken
        before.restore(self._steps)
        self._captured = self._fresh()  # what it had recorded was of an optimizer's state that is gone
        self._singly_until = until
        return self._steps.take(done)

    def _run(self, done: int, until: int) -> Taken | None:
        """``None`` where something was not finite."""
        steps, tasks = self._steps, 0
        while done < until:
            lr = steps.set_rates()
            batch = self._captured(steps.batches(done))
            if steps.scheduler is not None:
                steps.scheduler.step()
            tasks += len(batch)
            done += 1
            if self._stop():
                break
        loss, finite = self._captured.read()
        return Taken(done, batch, loss, lr, tasks) if finite else None

    def _fresh(self) -> CapturedStep[Batch]:
        steps = self._steps
        return CapturedStep(steps.gradient, steps.update, steps.device, self._graphs)


class _State:
    """All that steps change, as it was: to go back to."""

    def __init__(self, steps: Steps) -> None:
        self._tensors = [tensor.detach().clone() for tensor in _tensors_of(steps.method)]
        self._optimizer = deepcopy(steps.optimizer.state_dict())
        self._scheduler = None if steps.scheduler is None else deepcopy(steps.scheduler.state_dict())
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(steps.device) if steps.device.type == "cuda" else None

    @torch.no_grad()
    def restore(self, steps: Steps) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(steps.device)  # steps may still be on their way
        for tensor, before in zip(_tensors_of(steps.method), self._tensors, strict=True):
            tensor.copy_(before)
        steps.optimizer.load_state_dict(self._optimizer)
        if steps.scheduler is not None:
            steps.scheduler.load_state_dict(self._scheduler)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, steps.device)


def _tensors_of(method: nn.Module) -> list[Tensor]:
    return [*method.parameters(), *method.buffers()]


def check_graph(graph: Graph, device: torch.device, ranks: Ranks) -> str | None:
    """Why there are no graphs on a device, ``None`` if there are; ValueError where there have to be."""
    where = "on the CPU" if device.type != "cuda" else "with several ranks" if ranks.size > 1 else None
    if graph == "on" and where is not None:
        raise ValueError(f"graph: expected auto or off {where}, got on")
    return where


def graphs_for(
    graph: Graph, device: torch.device, ranks: Ranks, tell: Callable[[str], None]
) -> Graphs | None:
    """What records the steps on a device; ``None`` where they are not recorded.

    Raises:
        ValueError: they are to be, and cannot.
    """
    where = check_graph(graph, device, ranks)
    if graph == "off":
        return None
    if where is None:
        return CudaGraphs(device)
    if device.type == "cuda":
        tell(f"without a CUDA graph, which there is none of {where}")
    return None
