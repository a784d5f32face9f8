"""What MAML and its kin share: an MLP that adapts to each task by gradient descent."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import blame, check_choice, check_count, check_instance, check_not_negative
from metafast.adaptation.structure import recognise
from metafast.data import Episodes, Problem
from metafast.ops.inner_loop import inner_sgd, maml_loss, task_linear
from metafast.reference.inner_loop import LearningRate
from metafast.settings import Count, NotNegative, Settings, Whole, setting

from .method import Method
from .mlp import mlp

# Finn, Abbeel, Levine 2017, section 5.1 and appendix A.2.
SINE: Mapping[str, Any] = {
    "tasks": 25,
    "steps": 70_000,
    "precision": "float32",
    "log_every": 5000,
    "checkpoint_every": 10_000,
}
# The network without convolutions of section 5.2, without its batch norm.
IMAGES: Mapping[str, Any] = {
    "center": True,
    "hidden": (256, 128, 64),
    "inner_lr": 0.1,
    "inner_steps": 2,
    "tasks": 16,
    "steps": 4000,
    "schedule": "cosine",
    "precision": "float32",
    "log_every": 100,
    "checkpoint_every": 1000,
}


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings(Settings):
    hidden: tuple[Count, ...] = setting((40, 40), "widths of the hidden layers")
    activation: Literal["relu", "tanh"] = setting("relu", "between layers")
    inner_lr: NotNegative = setting(0.01, "learning rate of the inner loop")
    inner_steps: Whole = setting(1, "of the inner loop in training")
    test_steps: Whole | None = setting(None, "of the inner loop in evaluation; else --inner-steps")


class Adaptation(Method):
    """A network that is good after a few steps of gradient descent on a task's support.

    The inner loops of all tasks run in one call of the fused operations, which know MLPs: ``network`` is
    `nn.Sequential` of `nn.Linear` layers with the same `nn.ReLU` or `nn.Tanh` between them (what
    :func:`metafast.explain` calls fused), on examples that are flattened. Its weights stay its own: they are
    what training changes and what a checkpoint keeps.

    Args:
        network: [..., D] -> [..., O].
        loss: ``"mse"`` or ``"cross_entropy"``, of the inner loop and of the query.
        lr: the learning rate of the inner loop.
        steps: of the inner loop in training.
        test_steps: of the inner loop in :meth:`predict`; default: ``steps``.

    Raises:
        ValueError: ``network`` is no such network, ``loss`` another, or a number is negative.
        TypeError: an argument is of another type.
    """

    Settings = AdaptationSettings

    def __init__(
        self, network: nn.Module, *, loss: str, lr: float, steps: int, test_steps: int | None = None
    ) -> None:
        super().__init__()
        test_steps = steps if test_steps is None else test_steps
        check_instance(nn.Module, network=network)
        check_choice(("mse", "cross_entropy"), loss=loss)
        check_count(steps=steps, test_steps=test_steps)
        blame(numbers={"lr": lr})
        check_not_negative(lr=lr)
        known = recognise(network, {name for name, _ in network.named_parameters()})
        if isinstance(known, str) or not all(type(layer) is nn.Flatten for layer in known.body):
            why = known if isinstance(known, str) else f"it is {known}"
            raise ValueError(f"network: expected an MLP whose layers all adapt, but {why}")
        self._named = operator.attrgetter(*known.params)  # at each use: a module may be given other weights
        self.activation = known.activation
        self.network = network
        self.loss_name = loss
        # A tensor, as the operations take it, which goes where the weights go.
        self.register_buffer("lr", self.params[0].new_tensor(lr), persistent=False)
        self.steps = steps
        self.test_steps = test_steps

    @property
    def params(self) -> list[Tensor]:
        """[W1, b1, ..., WL, bL] of the network."""
        return list(self._named(self.network))

    def rates(self, steps: int) -> LearningRate:
        """The learning rate of so many steps, as :func:`metafast.inner_sgd` takes it."""
        return self.lr

    def adapt(self, x: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
        """The parameters after ``steps`` steps on the examples x [T, S, ...] of each task: each [T, ...]."""
        return inner_sgd(
            self.params,
            x.flatten(2),
            labels,
            loss=self.loss_name,
            lr=self.rates(steps),
            steps=steps,
            activation=self.activation,
        )

    def query_loss(self, episodes: Episodes, steps: int, *, first_order: bool = False) -> Tensor:
        """The mean query loss after ``steps`` steps on the support: a scalar, MAML's objective."""
        return maml_loss(
            self.params,
            episodes.support.flatten(2),
            episodes.support_labels,
            episodes.query.flatten(2),
            episodes.query_labels,
            loss=self.loss_name,
            lr=self.rates(steps),
            steps=steps,
            activation=self.activation,
            first_order=first_order,
        )

    def outputs(self, params: list[Tensor], x: Tensor) -> Tensor:
        """What the network gives with the parameters of each task: x [T, B, ...] -> [T, B, O]."""
        out = x.flatten(2)
        activate = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda x: x}[self.activation]
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            out = activate(task_linear(out, weight, bias))
        return task_linear(out, *params[-2:])

    def predict(self, episodes: Episodes, steps: int | None = None) -> Tensor:
        """As :meth:`Method.predict`, after ``steps`` steps on the support."""
        steps = self.test_steps if steps is None else steps
        params = self.adapt(episodes.support, episodes.support_labels, steps)
        out = self.outputs(params, episodes.query)
        return out.log_softmax(-1) if self.loss_name == "cross_entropy" else out

    @abstractmethod
    def loss(self, episodes: Episodes) -> Tensor: ...

    @classmethod
    def from_settings(cls, settings: Any, problem: Problem) -> Adaptation:
        return cls(**cls.arguments(settings, problem))

    @classmethod
    def arguments(cls, settings: Any, problem: Problem) -> dict[str, Any]:
        """The arguments of the class that the settings describe."""
        inputs = math.prod(problem.input_shape)
        network = mlp(inputs, settings.hidden, problem.outputs, settings.activation)
        if not problem.regression:
            nn.init.normal_(network[-1].weight, std=0.01)  # at first no class is favoured
        return {
            "network": network,
            "loss": "mse" if problem.regression else "cross_entropy",
            "lr": settings.inner_lr,
            "steps": settings.inner_steps,
            "test_steps": settings.test_steps,
        }
