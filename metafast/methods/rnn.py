"""The plain recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metafast._dispatch.arguments import check_count
from metafast.data import Problem
from metafast.settings import Count, setting

from .backbones import BackboneSettings
from .method import Recipes
from .sequence import RecurrentLearner, State


@dataclass(frozen=True, kw_only=True)
class RNNSettings(BackboneSettings):
    units: Count = setting(200, "of the LSTM")


class RNN(RecurrentLearner):
    """An LSTM that reads an episode as it would read a sentence: the baseline of Santoro et al. 2016.

    It has to keep all of the support in its state, by weights that it learned for that; the lecture's example
    of what could not be trained.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        features: D.
        ways: N, the classes of an episode.
        hidden: units of the LSTM.
    """

    paper = "Santoro et al. 2016, their baseline"
    Settings = RNNSettings
    recipes: ClassVar[Recipes] = {
        "images": {
            "shots": 5,
            "queries": 5,
            "tasks": 16,
            "steps": 2000,
            "lr": 3e-3,
            "schedule": "cosine",
            "image_size": 20,
            "hidden": 32,
            "log_every": 20,
            "checkpoint_every": 200,
        }
    }

    def __init__(self, backbone: nn.Module, features: int, ways: int, *, hidden: int = 200) -> None:
        super().__init__(backbone, features, ways)
        check_count(1, hidden=hidden)
        self.lstm = nn.LSTM(features + ways, hidden, batch_first=True)
        self.out = nn.Linear(hidden, ways)

    def run(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = None if state is None else tuple(tensor.unsqueeze(0).contiguous() for tensor in state)
        if lengths is None:
            hidden, state = self.lstm(inputs, state)
        else:
            packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
            hidden, state = self.lstm(packed, state)
            hidden, _ = pad_packed_sequence(hidden, batch_first=True, total_length=inputs.shape[1])
        return self.out(hidden), tuple(tensor.squeeze(0) for tensor in state)

    @classmethod
    def from_settings(cls, settings: RNNSettings, problem: Problem) -> RNN:
        backbone, (features,) = settings.build(problem)
        return cls(backbone, features, problem.outputs, hidden=settings.units)
