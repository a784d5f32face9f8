"""Reptile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from metafast.data import Episodes

from .adaptation import IMAGES, SINE, Adaptation, of_convolutions
from .method import Recipes, Reported


class Reptile(Adaptation):
    """Reptile (Nichol, Achiam, Schulman 2018): towards the weights that a task's inner loop ends at.

    It has no query: the inner loop of training runs on all examples of a task.
    """

    paper = "Nichol, Achiam, Schulman 2018"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.9539,
        ("omniglot", 5, 5): 0.989,
        ("omniglot", 20, 1): 0.8814,
        ("omniglot", 20, 5): 0.9665,
    }
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

    # The paper's inner loop is 5 steps of Adam in training and 50 in evaluation, on 10 shots and on 5.
    backbone_on: ClassVar[Mapping[str, str]] = {"omniglot": "conv4-strided"}
    by_backbone: ClassVar[Recipes] = of_convolutions(
        shots=5,
        queries=5,
        inner_lr=0.1,
        inner_steps=5,
        test_steps=20,
        tasks=5,
        optimizer="sgd",
        lr=1.0,
        schedule="linear",
    )

    def loss(self, episodes: Episodes) -> Tensor:
        """Half the squared distance to the mean of the adapted weights: a scalar.

        Its gradient is theta - mean(theta'), so that a step of plain SGD with learning rate eps is Reptile's
        own, theta + eps * mean(theta' - theta) (algorithm 2), and any other optimizer may take it.
        """
        x = torch.cat([episodes.support, episodes.query], dim=1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], dim=1)
        with torch.no_grad():
            ends = [param.mean(0) for param in self.adapt(x, labels, self.steps)]
        return sum((p - end).square().sum() for p, end in zip(self.params, ends, strict=True)) / 2
