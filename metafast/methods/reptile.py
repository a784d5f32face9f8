"""Reptile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count
from metafast.data import Episodes, Problem
from metafast.settings import Count, setting

from .adaptation import IMAGES, SINE, Adaptation, AnyNetworkSettings, of_convolutions
from .method import Recipes, Reported


@dataclass(frozen=True, kw_only=True)
class ReptileSettings(AnyNetworkSettings):
    inner_batch: Count | None = setting(
        None, "examples of a step of the inner loop in training, in random order; else all of a task"
    )


class Reptile(Adaptation):
    """Reptile (Nichol, Achiam, Schulman 2018): towards the weights that a task's inner loop ends at.

    It has no query: the inner loop of training runs on all examples of a task, on all at each step or on
    ``batch`` of them. The gradients of steps on different examples are what it learns to align (section 5.1).

    Args:
        network, loss, lr, steps, test_steps, transductive, path: as :class:`Adaptation`'s.
        batch: how many examples a step of training takes; it goes through all in random order, then through
            all again. Default: all at once.
    """

    paper = "Nichol, Achiam, Schulman 2018"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.9768,
        ("omniglot", 5, 5): 0.9948,
        ("omniglot", 20, 1): 0.8943,
        ("omniglot", 20, 5): 0.9712,
    }  # transductive; else 0.9539, 0.989, 0.8814 and 0.9665
    Settings = ReptileSettings
    recipes: ClassVar[Recipes] = {
        # The sine of the authors' own demonstration, but for the inner loop: 20 steps on all 20 points of a
        # wave, where theirs takes 5 steps, each on another 10 of 50 points.
        "sine": {
            **SINE,
            "hidden": (64, 64),
            "activation": "tanh",
            "inner_lr": 0.02,
            "inner_steps": 20,
            "test_steps": 32,
            "tasks": 1,
            "steps": 30_000,
            "optimizer": "sgd",
            "lr": 0.1,
            "schedule": "linear",
        },
        "images": {
            **IMAGES,
            "inner_steps": 10,
            "test_steps": 20,
            "optimizer": "sgd",
            "lr": 1.0,
            "schedule": "linear",
        },
    }

    # The paper's steps and batches in training (appendix A), by SGD where it has Adam; it takes 50 steps of 5
    # examples in evaluation.
    backbone_on: ClassVar[Mapping[str, str]] = {"omniglot": "conv4-strided"}
    by_backbone: ClassVar[Recipes] = of_convolutions(
        shots=5,
        queries=5,
        inner_lr=0.1,
        inner_steps=5,
        inner_batch=10,
        test_steps=20,
        tasks=5,
        optimizer="sgd",
        lr=1.0,
        schedule="linear",
    )

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
        batch: int | None = None,
    ) -> None:
        super().__init__(
            network,
            loss=loss,
            lr=lr,
            steps=steps,
            test_steps=test_steps,
            transductive=transductive,
            path=path,
        )
        if batch is not None:
            check_count(1, batch=batch)
        self.batch = batch

    def loss(self, episodes: Episodes) -> Tensor:
        """Half the squared distance to the mean of the adapted weights: a scalar.

        Its gradient is theta - mean(theta'), so that a step of plain SGD with learning rate eps is Reptile's
        own, theta + eps * mean(theta' - theta) (algorithm 2), and any other optimizer may take it.
        """
        x = torch.cat([episodes.support, episodes.query], dim=1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], dim=1)
        with torch.no_grad():
            if self.batch is None:
                adapted = self.adapt(x, labels, self.steps)
            else:
                adapted = self.adapt_by_batches(*self._batches(x, labels))
            ends = [param.mean(0) for param in adapted]
        return sum((p - end).square().sum() for p, end in zip(self.params, ends, strict=True)) / 2

    def _batches(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the steps, each [K, T, batch, ...]."""
        tasks, examples = labels.shape[:2]
        drawn = self.steps * self.batch
        rounds = torch.rand(tasks, math.ceil(drawn / examples), examples, device=x.device).argsort(-1)
        order = rounds.flatten(1)[:, :drawn].view(tasks, self.steps, self.batch).transpose(0, 1)
        of_task = torch.arange(tasks, device=x.device).unsqueeze(-1)
        return x[of_task, order], labels[of_task, order]

    @classmethod
    def arguments(cls, settings: ReptileSettings, problem: Problem) -> dict[str, Any]:
        return {**super().arguments(settings, problem), "batch": settings.inner_batch}
