"""Meta-SGD."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from metafast.data import Episodes

from .adaptation import IMAGES, SINE, Adaptation, of_convolutions
from .method import Recipes, Reported


class MetaSGD(Adaptation):
    """Meta-SGD (Li, Zhou, Chen, Li 2017): MAML that learns a learning rate for every weight.

    ``lr`` is where they begin.
    """

    paper = "Li, Zhou, Chen, Li 2017"
    reported: ClassVar[Reported] = {
        ("omniglot", 5, 1): 0.9953,
        ("omniglot", 5, 5): 0.9993,
        ("omniglot", 20, 1): 0.9593,
        ("omniglot", 20, 5): 0.9897,
    }
    recipes: ClassVar[Recipes] = {"sine": SINE, "images": {**IMAGES, "inner_lr": 0.05, "inner_steps": 1}}
    by_backbone: ClassVar[Recipes] = of_convolutions(test_steps=1)

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
        super().__init__(
            network,
            loss=loss,
            lr=lr,
            steps=steps,
            test_steps=test_steps,
            transductive=transductive,
            path=path,
        )
        self.lr = nn.ParameterList([self.lr.expand_as(param).clone() for param in self.params])

    def rates(self, steps: int) -> list[Tensor]:
        return list(self.lr)

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean query loss after adaptation: a scalar (algorithm 1, line 8)."""
        return self.query_loss(episodes, self.steps)
