"""What the training loop, the evaluation and the command line ask of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from metafast.data import Episodes, Problem
from metafast.data.sources import DATA, Source
from metafast.settings import Settings

Recipes = Mapping[str, Mapping[str, Any]]
"""Kind of data -> setting -> its default: of the method's own settings, the data's, the training's and the
run's, where it differs from what these say themselves."""

Reported = Mapping[tuple[str, int, int], float]
"""(data, ways, shots) -> accuracy."""


class Learner(nn.Module, ABC):
    """What training can train: a module with a loss over a batch of tasks.

    All but the loss serves the command line and a run's files.
    """

    Settings: ClassVar[type[Settings]]
    """The method's own settings."""

    recipes: ClassVar[Recipes]
    """The kinds of data that the method learns from, and what it does by default on each."""

    backbone_on: ClassVar[Mapping[str, str]] = {}
    """Data -> the backbone that is its default there, where that is another than the recipe's."""

    by_backbone: ClassVar[Recipes] = {}
    """Backbone -> setting -> its default on images with that one, in place of the recipe's."""

    sources: ClassVar[Mapping[str, type[Source]]] = DATA
    """What it may learn from: those of a kind that has a recipe."""

    source: ClassVar[str] = "data"
    """The option that names one of them."""

    paper: ClassVar[str]
    """Authors and year."""

    reported: ClassVar[Reported] = {}
    """What the paper reports."""

    @classmethod
    def recipe(cls, source: type[Source], backbone: str | None = None) -> Mapping[str, Any]:
        """Setting -> its default on these data, with a backbone that was asked for or the data's own."""
        recipe = cls.recipes[source.kind]
        if source.kind != "images":
            return recipe
        backbone = cls.backbone_on.get(source.name) if backbone is None else backbone
        return {**recipe, **cls.by_backbone.get(backbone, {}), **({"backbone": backbone} if backbone else {})}

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training minimises over a batch: a mean over tasks that can be differentiated."""

    def forward(self, batch: Any) -> Tensor:
        """The loss: what `torch.nn.parallel.DistributedDataParallel`, which wraps a module's call, trains."""
        return self.loss(batch)

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Any, problem: Any) -> Learner:
        """The method that ``settings``, a ``cls.Settings``, describe, for a problem, with fresh weights.

        Raises:
            ValueError: they do not fit the problem. The message begins with the name of the setting.
        """


class Method(Learner):
    """A few-shot learner: it learns from episodes, and predicts what their queries are."""

    @abstractmethod
    def loss(self, episodes: Episodes) -> Tensor:
        """What training minimises over a batch of episodes: a mean over tasks that can be differentiated."""

    @abstractmethod
    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query, support), [T, Q, N] with N = ``episodes.num_classes``; in regression y,
        [T, Q, O]."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Any, problem: Problem) -> Method: ...
