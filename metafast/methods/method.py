"""What the training loop, the evaluation and the command line ask of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from typing import Any, ClassVar

from torch import Tensor, nn

from metafast.data import Episodes, Problem
from metafast.program.options import Recipes


class Learner(nn.Module, ABC):
    """What training can train: a module with a loss over a batch of tasks.

    The recipes and the two class methods serve the command line; what they declare and read is the method's
    own.
    """

    recipes: ClassVar[Recipes]
    """The defaults of the options that depend on the data: ``"images"``, ``"sine"`` -> option -> value. What
    the method cannot learn from is absent, and so is an option from the data that it does not belong to."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training minimises over a batch: a mean over tasks that can be differentiated."""

    @classmethod
    @abstractmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Declares the method's options."""

    @classmethod
    @abstractmethod
    def from_options(cls, options: Namespace, problem: Any) -> Learner:
        """The method that the options describe, with fresh weights."""


class Method(Learner):
    """A few-shot learner: it learns from episodes, and predicts what their queries are."""

    @abstractmethod
    def loss(self, episodes: Episodes) -> Tensor:
        """What training minimises over a batch of episodes: a mean over tasks that can be differentiated."""

    @abstractmethod
    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query, support), [T, Q, N], N = ``episodes.ways``; in regression y, [T, Q, O]."""

    @classmethod
    @abstractmethod
    def from_options(cls, options: Namespace, problem: Problem) -> Method:
        """The method that the options describe, with fresh weights."""
