"""What MAML and its kin share: a network that adapts to each task by gradient descent."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast._dispatch.arguments import blame, check_choice, check_count, check_instance, check_not_negative
from metafast.adaptation.adapt import Adapted, adapt
from metafast.adaptation.inner_loop import layers_of
from metafast.adaptation.path import PATHS
from metafast.adaptation.scratch import structural_copy
from metafast.adaptation.structure import ConvNet, Mlp, recognise
from metafast.data import Episodes, Problem
from metafast.ops.inner_loop import inner_sgd, maml_loss, task_linear
from metafast.reference.inner_loop import LearningRate
from metafast.reference.labels import IGNORED
from metafast.settings import Count, NotNegative, Settings, Whole, setting

from .backbones import NETWORKS, build_backbone
from .method import Method, Recipes
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


def of_convolutions(**changes: Any) -> Recipes:
    """For the networks with convolutions of section 5.2, by backbone: an inner step in training, three in
    evaluation, and as many queries as shots."""
    recipe = {
        "center": False,
        "queries": 1,
        "inner_lr": 0.4,
        "inner_steps": 1,
        "test_steps": 3,
        "tasks": 32,
        "steps": 8000,
    }
    return {backbone: {**recipe, **changes} for backbone in ("conv4", "conv4-strided")}


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings(Settings):
    hidden: tuple[Count, ...] = setting((40, 40), "widths of the hidden layers")
    activation: Literal["relu", "tanh"] = setting("relu", "between layers")
    inner_lr: NotNegative = setting(0.01, "learning rate of the inner loop")
    inner_steps: Whole = setting(1, "of the inner loop in training")
    test_steps: Whole | None = setting(None, "of the inner loop in evaluation; else --inner-steps")

    def build(self, problem: Problem) -> nn.Module:
        """The network for a problem, all of which adapts."""
        network = mlp(math.prod(problem.input_shape), self.hidden, problem.outputs, self.activation)
        return network if problem.regression else _impartial(network)


@dataclass(frozen=True, kw_only=True)
class AnyNetworkSettings(AdaptationSettings):
    backbone: str = setting(
        "mlp",
        "the network: mlp, or what embeds an example below a linear layer: conv4, conv4-strided, resnet12, "
        "or FILE.py:FUNCTION, which takes the shape of an example and returns a module",
    )
    hidden: tuple[Count, ...] = setting(
        (40, 40), "widths of the mlp's hidden layers", only_with=("backbone", ("mlp",))
    )
    activation: Literal["relu", "tanh"] = setting(
        "relu", "between layers of the mlp", only_with=("backbone", ("mlp",))
    )
    channels: Count = setting(
        64, "of conv4 and conv4-strided, or of resnet12's first block", only_with=("backbone", NETWORKS)
    )
    transductive: bool = setting(
        True,
        "batch norm goes by the queries of a task together; else by the support, each query by itself",
    )

    def build(self, problem: Problem) -> nn.Module:
        if self.backbone == "mlp":
            network: nn.Module = super().build(problem)
        else:
            backbone, (features,) = build_backbone(
                self.backbone,
                problem.input_shape,
                self.channels,
                others=("mlp",),
                track_running_stats=False,
            )
            network = nn.Sequential(backbone, nn.Linear(features, problem.outputs))
            network = network if problem.regression else _impartial(network)
        if not self.transductive and not _norms(network):
            raise ValueError("transductive: expected a network with batch norm, which it is about, got none")
        return network


class Adaptation(Method):
    """A network that is good after a few steps of gradient descent on a task's support.

    An MLP, `nn.Sequential` of `nn.Linear` with the same `nn.ReLU` or `nn.Tanh` between them, runs in the
    fused operations, the inner loops of all tasks in one call, on examples that are flattened. Any other
    module runs through :func:`metafast.adapt`, on examples as they are, a Conv4 fused as well
    (:func:`metafast.explain` tells). The weights stay the network's own: they are what training changes and
    what a checkpoint keeps.

    Batch norm goes by the statistics of a task, in training and in evaluation: by those of the support in the
    inner loop, and for the queries by those of the task's queries together. What is predicted for a query
    then depends on the other queries (transductive, as in the code of Finn et al.). With
    ``transductive=False`` the queries are normalised by the mean and variance of their task's support under
    the adapted weights, so that each is predicted by itself; that costs one more pass over the support. The
    running statistics of the network itself are not used.

    Args:
        network: [..., D] -> [..., O], all of whose parameters that require grad adapt.
        loss: ``"mse"`` or ``"cross_entropy"``, of the inner loop and of the query.
        lr: the learning rate of the inner loop.
        steps: of the inner loop in training.
        test_steps: of the inner loop in :meth:`predict`; default: ``steps``.
        transductive: whether batch norm, where the network has any, sees the queries of a task together.
        path: of :func:`metafast.adapt`, where its own choice is not wanted; an MLP then goes through it too,
            on examples as they are.

    Raises:
        ValueError: ``network`` has no parameter that adapts, ``loss`` or ``path`` is another, or a number is
            negative.
        TypeError: an argument is of another type.
    """

    Settings = AnyNetworkSettings

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: str,
        lr: float,
        steps: int,
        test_steps: int | None = None,
        transductive: bool = True,
        path: str | None = None,
    ) -> None:
        super().__init__()
        test_steps = steps if test_steps is None else test_steps
        check_instance(nn.Module, network=network)
        check_choice(("mse", "cross_entropy"), loss=loss)
        check_count(steps=steps, test_steps=test_steps)
        blame(numbers={"lr": lr})
        check_not_negative(lr=lr)
        check_instance(bool, transductive=transductive)
        if path is not None:
            check_choice(PATHS, path=path)
        known = recognise(network, {name for name, _ in network.named_parameters()}, None)
        self.fused = path is None and _is_flat(known)
        if self.fused:
            names = list(known.params)
        else:
            names = [name for name, param in network.named_parameters() if param.requires_grad]
        if not names:
            raise ValueError("network: expected a parameter that requires grad, got none")
        self._named = operator.attrgetter(*names)  # at each use: a module may be given other weights
        self._names = names
        self.activation = known.activation if self.fused else None
        self.network = network
        self.loss_name = loss
        # A tensor, as the operations take it, which goes where the weights go.
        self.register_buffer("lr", self.params[0].new_tensor(lr), persistent=False)
        self.steps = steps
        self.test_steps = test_steps
        self.transductive = transductive
        self.path = path

    @property
    def params(self) -> list[Tensor]:
        """Those of the network that adapt; of an MLP [W1, b1, ..., WL, bL]."""
        found = self._named(self.network)
        return list(found) if len(self._names) > 1 else [found]

    @property
    def layers(self) -> int:
        """L: how many layers have parameters that adapt."""
        return len(layers_of(self._names))

    def rates(self, steps: int) -> LearningRate:
        """The learning rate of so many steps, as :func:`metafast.adapt` takes it."""
        return self.lr

    def adapt(self, x: Tensor, labels: Tensor, steps: int) -> list[Tensor]:
        """The parameters after ``steps`` steps on the examples x [T, S, ...] of each task: each [T, ...]."""
        if not self.fused:
            return list(self._adapted(x, labels, steps).params.values())
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
        if not self.fused:
            out = self._query_outputs(episodes, steps, first_order=first_order)
            return self.losses(out, episodes.query_labels).mean()
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

    def losses(self, out: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of each task: out [T, B, O], labels as in :class:`Episodes` -> [T]."""
        if self.loss_name == "mse":
            if out.shape != labels.shape:
                raise ValueError(
                    f"labels: expected the shape of the outputs, {list(out.shape)}, got {list(labels.shape)}"
                )
            return (out - labels).square().flatten(1).mean(1)
        each = F.cross_entropy(out.transpose(1, 2), labels, reduction="none")
        return each.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)

    def outputs(self, params: list[Tensor], x: Tensor) -> Tensor:
        """What an MLP gives with the parameters of each task: x [T, B, ...] -> [T, B, O]."""
        out = x.flatten(2)
        activate = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda x: x}[self.activation]
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            out = activate(task_linear(out, weight, bias))
        return task_linear(out, *params[-2:])

    def predict(self, episodes: Episodes, steps: int | None = None) -> Tensor:
        """As :meth:`Method.predict`, after ``steps`` steps on the support."""
        steps = self.test_steps if steps is None else steps
        if self.fused:
            params = self.adapt(episodes.support, episodes.support_labels, steps)
            out = self.outputs(params, episodes.query)
        else:
            out = self._query_outputs(episodes, steps)
        if self.loss_name == "mse":
            return out
        if episodes.ways is not None:
            absent = torch.arange(out.shape[-1], device=out.device) >= episodes.ways.unsqueeze(-1)  # [T, O]
            out = out.masked_fill(absent.unsqueeze(1), -torch.inf)
        return out.log_softmax(-1)

    def adapt_by_batches(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        """The parameters after a step on each of K batches, x [K, T, B, ...]: each [T, ...]."""
        x = x.flatten(3) if self.fused else x
        return list(self._adapted(x, labels, len(x), per_step=True).params.values())

    def _adapted(self, x: Tensor, labels: Tensor, steps: int, **options: bool) -> Adapted:
        return adapt(
            self._by_batch(),
            x,
            labels,
            loss=self.loss_name,
            lr=self.rates(steps),
            steps=steps,
            path=self.path,
            **options,
        )

    def _query_outputs(self, episodes: Episodes, steps: int, *, first_order: bool = False) -> Tensor:
        """What any module gives for the queries after ``steps`` steps on the support: [T, Q, O]."""
        examples = episodes.support, episodes.support_labels
        adapted = self._adapted(*examples, steps, first_order=first_order)
        if self.transductive or not _norms(self.network):
            return adapted(episodes.query)
        return adapted(episodes.query, statistics_of=episodes.support)

    def _by_batch(self) -> nn.Module:
        """The network, or a double, with batch norm by the statistics of the batch, in whichever mode the
        network is itself."""
        if all(norm.training or norm.running_mean is None for norm in _norms(self.network)):
            return self.network
        double = structural_copy(self.network)
        for norm in _norms(double):
            norm.train()
        return double

    @abstractmethod
    def loss(self, episodes: Episodes) -> Tensor: ...

    @classmethod
    def from_settings(cls, settings: Any, problem: Problem) -> Adaptation:
        return cls(**cls.arguments(settings, problem))

    @classmethod
    def arguments(cls, settings: Any, problem: Problem) -> dict[str, Any]:
        """The arguments of the class that the settings describe."""
        return {
            "network": settings.build(problem),
            "loss": "mse" if problem.regression else "cross_entropy",
            "lr": settings.inner_lr,
            "steps": settings.inner_steps,
            "test_steps": settings.test_steps,
            "transductive": settings.transductive,
        }


def _is_flat(known: Mlp | ConvNet | str) -> bool:
    """Is it an MLP behind nothing, or behind what flattens?"""
    return isinstance(known, Mlp) and all(type(layer) is nn.Flatten for layer in known.body)


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [part for part in network.modules() if isinstance(part, _BatchNorm)]


def _impartial(network: nn.Sequential) -> nn.Sequential:
    """The network with a last layer that at first favours no class."""
    nn.init.normal_(network[-1].weight, std=0.01)
    nn.init.zeros_(network[-1].bias)
    return network
