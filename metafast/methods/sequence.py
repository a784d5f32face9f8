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
from metafast.reference.labels import IGNORED, checked_labels

from .method import Method

State = tuple[Tensor, ...]
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fill the unit interval evenly, however many there are


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
        """[T, B] -> [T, B, N], zero where a label is -100."""
        labels = checked_labels("labels", labels, self.ways)
        return one_hot(labels, self.ways).to(like.dtype)

    def order(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """In which order the examples of each task are read, [T, B], and how many of them there are, [T].

        What is labelled -100 comes last. In training the order is random. Else it is the same in every call,
        and not that of the episode: class after class would be a sequence that training never shows.
        """
        known = labels != IGNORED
        if self.training:
            keys = torch.rand(labels.shape, device=labels.device)
        else:
            keys = (known.cumsum(1) * _GOLDEN) % 1
        return keys.masked_fill(~known, torch.inf).argsort(1), known.sum(1)

    def of_classes(self, logits: Tensor, episodes: Episodes) -> Tensor:
        """The network's outputs for the classes that the tasks have: [T, B, N of the network] -> [T, B, N].

        Those of classes that a task does not have are -inf.
        """
        logits = logits[..., : episodes.num_classes]
        if episodes.ways is None:
            return logits
        classes = torch.arange(logits.shape[-1], device=logits.device)
        absent = classes >= episodes.ways.unsqueeze(-1)  # [T, N]
        return logits.masked_fill(absent.unsqueeze(1), -torch.inf)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[...] -> bool [..., N]; unlike `F.one_hot` it asks nothing of the values, which may lie on a GPU."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


class RecurrentLearner(SequenceLearner):
    """A recurrent network over (x_t, y_{t-1}) that predicts y_t (Santoro et al. 2016, section 2).

    It trains on whole sequences: the examples of an episode, support and query, in random order, with a loss
    at each; so a class is guessed at its first instance, and known at later ones.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        features: D.
        ways: N, the classes of an episode.
    """

    def __init__(self, backbone: nn.Module, features: int, ways: int) -> None:
        super().__init__(backbone, ways)
        check_count(1, features=features)
        self.norm = nn.BatchNorm1d(features, affine=False)

    @abstractmethod
    def run(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """inputs [B, L, D + N] and a state, each [B, ...], -> outputs [B, L, N] and the state after.

        Args:
            lengths: [B], of the sequences, if not all are L long; outputs beyond say nothing.
        """

    def embed(self, examples: Tensor) -> Tensor:
        """[T, B, ...] -> [T, B, D], each feature around 0 and of one size, whatever the backbone learns.

        Before the network has learned to read them, embeddings are noise to it, and training would make them
        vanish for good; and what all examples have in common would make all keys alike.
        """
        return self.norm(super().embed(examples).flatten(0, 1)).unflatten(0, examples.shape[:2])

    def sequence(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """All examples of each task in random order, and their labels: [T, L, ...], [T, L].

        What is labelled -100 comes last.
        """
        examples = torch.cat([episodes.support, episodes.query], 1)
        labels = torch.cat([episodes.support_labels, episodes.query_labels], 1)
        keys = torch.rand(labels.shape, device=labels.device)
        order = keys.masked_fill(labels == IGNORED, torch.inf).argsort(1)
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
        logits = self.of_classes(self.outputs(examples, labels), episodes)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def accuracy_by_instance(self, episodes: Episodes) -> Tensor:
        """How often the first, second, ... example of a class in a sequence is classified right: [T, M].

        M is the most examples of a class in an episode, support and query together. A task in which no class
        has so many gives NaN there.
        """
        examples, labels = self.sequence(episodes)
        right = self.of_classes(self.outputs(examples, labels), episodes).argmax(-1) == labels
        counts = self.one_hot(labels, examples).cumsum(1)  # of each class, up to each step
        seen = counts.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)  # 1, 2, ...
        seen = seen.masked_fill(labels == IGNORED, 0)
        instances = [seen == m for m in range(1, int(counts.max()) + 1)]
        return torch.stack([(right & at).sum(1) / at.sum(1) for at in instances], 1)

    def predict(self, episodes: Episodes) -> Tensor:
        """log p(class | query), each query by itself after the support: [T, Q, N]."""
        order, lengths = self.order(episodes.support_labels)
        count, queries = order.shape[1], episodes.query.shape[1]
        tasks = torch.arange(len(order), device=order.device)
        embedded = self.embed(torch.cat([episodes.support, episodes.query], 1))
        support, query = embedded.split([count, queries], 1)
        support = support[tasks.unsqueeze(1), order]
        labels = self.one_hot(episodes.support_labels.gather(1, order), embedded)
        before = F.pad(labels, (0, 0, 1, 0))  # y_{t-1}
        _, state = self.run(torch.cat([support, before[:, :-1]], -1), lengths=lengths)
        last = before[tasks, lengths].unsqueeze(1).expand(-1, queries, -1)
        inputs = torch.cat([query, last], -1).flatten(0, 1).unsqueeze(1)  # each a sequence of one
        out, _ = self.run(inputs, tuple(tensor.repeat_interleave(queries, 0) for tensor in state))
        return self.of_classes(out.view(-1, queries, self.ways), episodes).log_softmax(-1)
