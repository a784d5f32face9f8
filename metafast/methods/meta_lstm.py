"""The meta-LSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_instance
from metafast.data import Episodes, Problem
from metafast.optim.meta_lstm import MetaLSTM
from metafast.settings import Count, Range, Share, setting

from .adaptation import IMAGES, Adaptation, AdaptationSettings
from .method import Recipes


@dataclass(frozen=True, kw_only=True)
class MetaLSTMSettings(AdaptationSettings):
    inner_lr: Share = setting(0.2, "where the input gate begins, a learning rate")
    cell_layers: Annotated[int, Range(ge=0, le=3)] = setting(
        1,
        "LSTM layers below the gates of the meta-LSTM; with 0 the gates see the gradient, the loss, the "
        "weight and themselves alone",
    )
    cell_hidden: Count = setting(20, "units of such a layer", only_with=("cell_layers", (1, 2, 3)))


class MetaLSTMLearner(Adaptation):
    """The meta-LSTM (Ravi and Larochelle 2017): an LSTM trains the network, whose weights are its cell state.

    The network's own weights are where the cell state begins. Both they and the cell's weights learn from the
    query loss after the steps, by a meta-gradient that takes the support's gradients and losses on the way as
    constants (the paper's gradient independence assumption).

    Args:
        cell: what takes the steps.
        network: an MLP, as :class:`Adaptation` has it.
        loss, steps, test_steps: as :class:`Adaptation`'s; ``lr`` is the cell's first input gate.
    """

    paper = "Ravi, Larochelle 2017"
    Settings = MetaLSTMSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            **IMAGES,
            "hidden": (64,),
            "inner_lr": 0.2,
            "inner_steps": 5,
            "shots": 5,
            "tasks": 4,
            "steps": 2400,
            "lr": 2e-3,
            "log_every": 20,
            "checkpoint_every": 100,
        },
    }

    def __init__(
        self, network: nn.Module, cell: MetaLSTM, *, loss: str, steps: int, test_steps: int | None = None
    ) -> None:
        check_instance(MetaLSTM, cell=cell)
        super().__init__(network, loss=loss, lr=cell.first_gates[0], steps=steps, test_steps=test_steps)
        if not self.fused:
            raise ValueError(
                "network: expected an MLP whose layers all adapt, nn.Sequential of nn.Linear with the same "
                "nn.ReLU or nn.Tanh between; metafast.explain tells what stands in the way"
            )
        self.cell = cell

    def adapt(self, x: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
        """The parameters after ``steps`` steps on the examples x [T, S, ...] of each task: each [T, ...].

        A call of the cell is one task's: the loss is an input that all coordinates of a call share.
        """
        starts = self.params
        if steps == 0:
            return [start.expand(len(x), *start.shape) for start in starts]
        theta = [start.detach().expand(len(x), *start.shape).clone() for start in starts]
        states = [self.cell.initial_state(starts) for _ in x]
        grads, losses = [], []
        with torch.no_grad():
            for _ in range(steps):
                grad, loss = self._gradient(theta, x, labels)
                for task, state in enumerate(states):
                    of_task = [p[task] for p in theta], [g[task] for g in grad], loss[task]
                    self.cell.step_(*of_task, state)
                grads.append(grad)
                losses.append(loss)
        if not torch.is_grad_enabled():
            return theta
        # The same steps again, in one call for each task, which autograd records.
        begin = self.cell.initial_state(starts)
        ends = []
        for task in range(len(x)):
            along = [torch.stack([grad[task] for grad in of_param]) for of_param in zip(*grads, strict=True)]
            thetas, _ = self.cell.unroll(starts, along, torch.stack(losses)[:, task], begin)
            ends.append([theta[-1] for theta in thetas])
        return _stack(ends)

    def _gradient(self, theta: list[Tensor], x: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of each task's loss with its parameters, and that loss: each [T, ...], and [T]."""

        def total(theta: list[Tensor]) -> tuple[Tensor, Tensor]:
            losses = self.losses(self.outputs(theta, x), labels)
            return losses.sum(), losses

        return torch.func.grad(total, has_aux=True)(theta)

    def query_loss(self, episodes: Episodes, steps: int) -> Tensor:
        theta = self.adapt(episodes.support, episodes.support_labels, steps)
        return self.losses(self.outputs(theta, episodes.query), episodes.query_labels).mean()

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean query loss after the steps: a scalar (algorithm 1)."""
        return self.query_loss(episodes, self.steps)

    @classmethod
    def arguments(cls, settings: MetaLSTMSettings, problem: Problem) -> dict[str, Any]:
        return {
            "network": settings.build(problem),
            "cell": MetaLSTM(settings.cell_hidden, settings.cell_layers, input_gate=settings.inner_lr),
            "loss": "mse" if problem.regression else "cross_entropy",
            "steps": settings.inner_steps,
            "test_steps": settings.test_steps,
        }


def _stack(tasks: list[list[Tensor]]) -> list[Tensor]:
    """Of each task its tensors -> the tensors, each [T, ...]."""
    return [torch.stack(of_tasks) for of_tasks in zip(*tasks, strict=True)]
