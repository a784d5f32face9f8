"""Model-agnostic meta-learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metafast.data import Episodes, Problem
from metafast.reference.inner_loop import LearningRate
from metafast.settings import setting

from .adaptation import IMAGES, SINE, Adaptation, AnyNetworkSettings, of_convolutions
from .method import Recipes, Reported


@dataclass(frozen=True, kw_only=True)
class MAMLSettings(AnyNetworkSettings):
    learn_inner_lr: bool = setting(
        False, "learn the rate of every step and layer, as MAML++; --inner-lr is where they begin"
    )


class MAML(Adaptation):
    """MAML (Finn, Abbeel, Levine 2017): weights from which a few steps learn a task.

    By the exact meta-gradient, through all steps.

    Args:
        network, loss, lr, steps, test_steps, transductive, path: as :class:`Adaptation`'s.
        learn_lr: learn the rate of every step and layer with the weights, ``lr`` at first (MAML++, Antoniou
            et al. 2019, section 4). ``steps`` is then at least 1, and steps beyond it take the rates of the
            last.
    """

    paper = "Finn, Abbeel, Levine 2017"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.987,
        ("omniglot", 5, 5): 0.999,
        ("omniglot", 20, 1): 0.958,
        ("omniglot", 20, 5): 0.989,
    }  # with convolutions; without, 0.897 and 0.975
    Settings = MAMLSettings
    recipes: ClassVar[Recipes] = {
        "sine": SINE,
        "images": {**IMAGES, "learn_inner_lr": True, "test_steps": 5},
    }
    backbone_on: ClassVar[Mapping[str, str]] = {"omniglot": "conv4-strided"}
    by_backbone: ClassVar[Recipes] = of_convolutions(learn_inner_lr=False)

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
        learn_lr: bool = False,
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
        if learn_lr:
            if self.steps == 0:
                raise ValueError("steps: expected at least 1, whose rates are learned, got 0")
            self.lr = nn.Parameter(self.lr.expand(self.steps, self.layers).clone())  # [K, L]

    def rates(self, steps: int) -> LearningRate:
        if self.lr.dim() == 0 or steps == self.steps:
            return self.lr
        return self.lr[torch.arange(steps, device=self.lr.device).clamp(max=self.steps - 1)]

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean query loss after adaptation: a scalar (algorithm 1, line 8)."""
        return self.query_loss(episodes, self.steps)

    @classmethod
    def arguments(cls, settings: MAMLSettings, problem: Problem) -> dict[str, Any]:
        if settings.learn_inner_lr and settings.inner_steps < 1:
            raise ValueError(
                f"inner_steps: expected at least 1, whose rates are learned, got {settings.inner_steps}"
            )
        return {**super().arguments(settings, problem), "learn_lr": settings.learn_inner_lr}
