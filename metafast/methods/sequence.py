"""Learning as a recurrent network: what the plain RNN, the MANN and SNAIL share.

An episode is a sequence of examples with their labels, and the network that reads it is the learner: its
state after the support is the classifier.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count, check_instance
from metafast.data import Episodes
from metafast.reference.labels import checked_classes

from .method import Method

State = tuple[Tensor, ...]


class SequenceLearner(Method):
    """Reads the support example by example, then predicts a query.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        ways: N, the classes of an episode.
    """

    def __init__(self, backbone: nn.Module, ways: int) -> None:
        super().__init__()
        check_instance(nn.Module, backbone=backbone)
        check_count(1, ways=ways)
        self.backbone = backbone
        self.ways = ways

    def embed(self, examples: Tensor) -> Tensor:
        """[T, B, ...] -> [T, B, D]."""
        return self.backbone(examples.flatten(0, 1)).unflatten(0, examples.shape[:2])

    def one_hot(self, labels: Tensor, like: Tensor) -> Tensor:
        """[T, B] -> [T, B, N]."""
        labels = checked_classes("labels", labels, self.ways)
        return one_hot(labels, self.ways).to(like.dtype)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[...] -> bool [..., N]; unlike `F.one_hot` it asks nothing of the values, which may lie on a GPU."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


class RecurrentLearner(SequenceLearner):
    """A recurrent network over (x_t, y_{t-1}) that predicts y_t (Santoro et al. 2016, section 2).

    It trains on whole sequences: the examples of an episode, support and query, in random order, with a loss
    at each; so a class is guessed at its first instance, and known at later ones.
    """

    @abstractmethod
    def run(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """inputs [B, L, D + N] and a state, each [B, ...], -> outputs [B, L, N] and the state after."""

    def embed(self, examples: Tensor) -> Tensor:
        """[T, B, ...] -> [T, B, D], of one size whatever the backbone learns.

        Before the network has learned to read them, embeddings are noise to it, and training would make them
        vanish for good.
        """
        embedded = super().embed(examples)
        return F.layer_norm(embedded, embedded.shape[-1:])

    def sequence(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """All examples of each task in random order, and their labels: [T, L, ...], [T, L]."""
        examples = torch.cat([episodes.support, episodes.query], 1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], 1)
        order = torch.rand(labels.shape, device=labels.device).argsort(1)
        tasks = torch.arange(len(labels), device=labels.device).unsqueeze(1)
        return examples[tasks, order], labels[tasks, order]

    def outputs(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of a sequence, each before its label is seen: [T, L, ...], [T, L] -> log odds [T, L, N]."""
        embedded = self.embed(examples)
        before = F.pad(self.one_hot(labels, embedded)[:, :-1], (0, 0, 1, 0))  # y_{t-1}, none before the first
        return self.run(torch.cat([embedded, before], -1))[0]

    def loss(self, episodes: Episodes) -> Tensor:
        """The mean cross entropy over the steps of the sequences: a scalar."""
        examples, labels = self.sequence(episodes)
        return F.cross_entropy(self.outputs(examples, labels).flatten(0, 1), labels.flatten())

    def accuracy_by_instance(self, episodes: Episodes) -> Tensor:
        """How often the first, second, ... example of a class in a sequence is classified right: [T, M].

        M is the number of examples of a class in an episode, support and query together, the same for all.
        """
        examples, labels = self.sequence(episodes)
        right = self.outputs(examples, labels).argmax(-1) == labels
        counts = self.one_hot(labels, examples).cumsum(1)  # of each class, up to each step
        seen = counts.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # 1, 2, ...
        instances = [(seen == m) for m in range(1, labels.shape[1] // self.ways + 1)]
        return torch.stack([(right & at).sum(1) / at.sum(1) for at in instances], 1)

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query), each query by itself after the support: [T, Q, N].

        The support is read in an order of its own, the same in every call: class after class would be a
        sequence that training never shows.
        """
        count, queries = episodes.support_labels.shape[1], episodes.query.shape[1]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        embedded = self.embed(torch.cat([episodes.support[:, order], episodes.query], 1))
        support, query = embedded.split([count, queries], 1)
        labels = self.one_hot(episodes.support_labels[:, order], embedded)
        _, state = self.run(torch.cat([support, F.pad(labels[:, :-1], (0, 0, 1, 0))], -1))
        last = labels[:, -1:].expand(-1, queries, -1)
        inputs = torch.cat([query, last], -1).flatten(0, 1).unsqueeze(1)  # each a sequence of one
        out, _ = self.run(inputs, tuple(tensor.repeat_interleave(queries, 0) for tensor in state))
        return out.view(-1, queries, self.ways).log_softmax(-1)
