"""What the training loop, the evaluation and the command line ask of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace

from torch import Tensor, nn

from metafast.data import Episodes


class Method(nn.Module, ABC):
    """A few-shot classifier: a module with a loss and log-probabilities over episodes.

    The two class methods serve the command line; what they declare and read is the method's own.
    """

    @abstractmethod
    def loss(self, episodes: Episodes) -> Tensor:
        """What training minimises over a batch of episodes: a scalar that can be differentiated."""

    @abstractmethod
    def log_probs(self, episodes: Episodes) -> Tensor:
        """log p(class | query, support): [T, Q, N], N = ``episodes.ways``."""

    @classmethod
    @abstractmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Declares the method's options."""

    @classmethod
    @abstractmethod
    def from_options(cls, options: Namespace, image_shape: tuple[int, ...]) -> Method:
        """The method that the options describe, with fresh weights, for images of shape (ch, H, W)."""
