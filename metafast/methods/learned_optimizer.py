"""Meta-training of gradient descent as an LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from metafast._dispatch.arguments import check_choice, check_count, check_instance
from metafast.data import Optimizees
from metafast.data.optimizees import Optimization
from metafast.data.sources import TASKS
from metafast.optim.coordinatewise_lstm import CoordinatewiseLSTM
from metafast.settings import Count, Positive, Range, Settings, setting

from .method import Learner, Recipes

_OBJECTIVES = ("loss", "log")

# Section 3.1 of the paper, at its full horizon.
_QUADRATIC: Mapping[str, Any] = {
    "tasks": 16,
    "steps": 4000,
    "lr": 5e-3,
    "schedule": "cosine",
    "precision": "float32",
    "log_every": 200,
    "checkpoint_every": 500,
}
# Section 3.2. Gradients below exp(-5), of which these problems have many, stay linear; the logarithm weighs
# the end, where minibatches make steps noisy; scaled coordinates are a little of what other networks have.
_TRAINING: Mapping[str, Any] = {
    **_QUADRATIC,
    "p": 5.0,
    "objective": "log",
    "random_scaling": 1.0,
    "tasks": 1,
    "steps": 1000,
    "lr": 4e-3,
    "log_every": 25,
    "checkpoint_every": 100,
}


@dataclass(frozen=True, kw_only=True)
class LearnedOptimizerSettings(Settings):
    hidden: Count = setting(20, "units of a layer")
    layers: Annotated[int, Range(ge=1, le=3)] = setting(2, "of the LSTM")
    preprocess: Literal["log_sign", "none"] = setting("log_sign", "of the gradients")
    p: Positive = setting(
        10.0,
        "of log_sign: gradients below exp(-X) count as small",
        only_with=("preprocess", ("log_sign",)),
    )
    scale: float = setting(0.1, "what the LSTM's output is multiplied by")
    objective: Literal["loss", "log"] = setting("loss", "the loss of a step, or its logarithm")
    truncation: Count = setting(20, "steps that the meta-gradient goes through")


class LearnedOptimizer(Learner):
    """Gradient descent as an LSTM (Andrychowicz et al. 2016): learns to optimise, on problems of one kind.

    The meta-gradient is the paper's: of the losses along the trajectory, through the LSTM, its state and the
    parameters, with the gradients that it sees taken as given (section 2.1), and cut every ``truncation``
    steps. So the trajectory runs without autograd and its gradients are recorded; then one call of the fused
    unroll differentiates all its parts at once. All problems of a batch run together, their coordinates in
    one call. The paper moves the LSTM's weights after each part; here they move once, by the mean over all
    parts, so that a step depends on its batch alone and a run resumes from the weights.

    Args:
        cell: what learns.
        truncation: steps of a part; divides the number of steps of the problems.
        objective: what is averaged over steps and problems: ``"loss"`` (equation 3 with w = 1), or ``"log"``,
            its logarithm, to which a small loss counts as much as a large one: for the loss at the end rather
            than fast progress at first. The loss has to be positive.
    """

    paper = "Andrychowicz et al. 2016"
    Settings = LearnedOptimizerSettings
    sources = TASKS
    source = "task"
    recipes: ClassVar[Recipes] = {
        "quadratic": _QUADRATIC,
        "digits-mlp": _TRAINING,
        "omniglot-mlp": _TRAINING,
    }

    def __init__(self, cell: CoordinatewiseLSTM, *, truncation: int = 20, objective: str = "loss") -> None:
        super().__init__()
        check_instance(CoordinatewiseLSTM, cell=cell)
        check_count(1, truncation=truncation)
        check_choice(_OBJECTIVES, objective=objective)
        self.cell = cell
        self.truncation = truncation
        self.objective = objective

    def loss(self, problems: Optimizees) -> Tensor:
        """The mean of the objective after each step, over steps and problems: a scalar.

        Raises:
            ValueError: ``truncation`` does not divide the number of steps.
        """
        steps, length = problems.steps, self.truncation
        self.check_steps(steps)
        params = [tensor.clone() for tensor in problems.start]
        state = self.cell.initial_state(params)
        begun: list[Tensor] = []  # the parameters, and the states, that the parts begin from
        states: list[Tensor] = []
        recorded = [tensor.new_empty(steps + 1, *tensor.shape) for tensor in params]
        losses = []
        for step in range(steps + 1):
            loss, grads = _gradients(problems, params, step)
            losses.append(loss)
            for record, grad in zip(recorded, grads, strict=True):
                record[step] = grad
            if step == steps:
                break
            if step % length == 0:
                begun += [tensor.clone() for tensor in params]
                states.append(state.clone())
            self.cell.step_(params, grads, state)

        # The parts count as parameters of their own, side by side in one unroll. The loss after a step has
        # the gradient that the next step sees.
        after = torch.stack(losses[1:])  # [K, T]
        slopes = [record[1:] for record in recorded]
        if self.objective == "log":
            slopes = [slope / after.view(*after.shape, *[1] * (slope.dim() - 2)) for slope in slopes]
            after = after.log()
        starts = range(0, steps, length)
        seen = [record[start : start + length] for start in starts for record in recorded]
        slopes = [slope[start : start + length] for start in starts for slope in slopes]
        trajectory, _ = self.cell.unroll(seen, torch.cat(states), begun)
        linear = sum((theta * slope).sum() for theta, slope in zip(trajectory, slopes, strict=True))
        return after.mean() + (linear - linear.detach()) / after.numel()

    def check_steps(self, steps: int) -> None:
        """Raises ``ValueError`` where ``truncation`` does not divide the number of steps of the problems."""
        if steps % self.truncation:
            raise ValueError(f"truncation: expected a divisor of the {steps} steps, got {self.truncation}")

    @classmethod
    def from_settings(cls, settings: LearnedOptimizerSettings, problem: Optimization) -> LearnedOptimizer:
        cell = CoordinatewiseLSTM(
            settings.hidden,
            settings.layers,
            preprocess=settings.preprocess,
            p=settings.p,
            scale=settings.scale,
        )
        method = cls(cell, truncation=settings.truncation, objective=settings.objective)
        method.check_steps(problem.steps)
        return method


def _gradients(problems: Optimizees, params: list[Tensor], step: int) -> tuple[Tensor, list[Tensor]]:
    """The losses of a step [T], and their gradients, each [T, ...]."""
    leaves = [tensor.detach().requires_grad_() for tensor in params]
    with torch.enable_grad():
        losses = problems.losses(leaves, step)
        grads = torch.autograd.grad(losses.sum(), leaves)
    return losses.detach(), list(grads)
