"""Memory-augmented neural networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count
from metafast.data import Problem
from metafast.ops.pairwise import pairwise_distance
from metafast.settings import Count, setting

from .backbones import BackboneSettings
from .method import Recipes
from .sequence import RecurrentLearner, State, one_hot

_STRENGTH = 9.0  # to which softplus adds nothing, and the formula 1


@dataclass(frozen=True, kw_only=True)
class MANNSettings(BackboneSettings):
    units: Count = setting(200, "of the controller")
    rows: Count = setting(128, "of the memory")
    width: Count = setting(40, "of the memory's rows")
    heads: Count = setting(4, "that read and write")


class MANN(RecurrentLearner):
    """Meta-learning with memory-augmented neural networks (Santoro et al. 2016).

    An LSTM controls a memory of rows: at each step every head reads by content, and writes either where it
    read last or to a row that was used least (least recently used access, section 3.2).

    - w^r = softmax over rows of ``strength`` cos(key, row), with the key of a head (equations 2 and 3), by
      what the rows hold before they are written to: nothing is as like the key as the row that it has just
      been written to, and what an earlier example left would not be found
    - w^u = decay w^u + w^r + w^w, summed over heads (equation 5)
    - w^w = sigmoid(gate) w^r_{t-1} + (1 - sigmoid(gate)) w^lu_{t-1} (equation 7)
    - rows += w^w key, the least used ones emptied before (equation 8)

    Head h takes the h-th least used row, and every head empties its own. The strength is learned, as in the
    Neural Turing Machine, and begins at 10: without it a softmax of cosines over 128 rows is nearly even, and
    hardly any gradient comes back.

    Args:
        backbone: embeds a batch of examples, [B, ...] -> [B, D].
        features: D.
        ways: N, the classes of an episode.
        hidden: units of the controller.
        rows, width: of the memory.
        heads: that read, and write.
        decay: of the usage.
    """

    paper = "Santoro et al. 2016"
    Settings = MANNSettings
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

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        ways: int,
        *,
        hidden: int = 200,
        rows: int = 128,
        width: int = 40,
        heads: int = 4,
        decay: float = 0.95,
    ) -> None:
        super().__init__(backbone, features, ways)
        check_count(1, hidden=hidden, width=width, heads=heads)
        check_count(heads, rows=rows)
        self.rows, self.width, self.heads, self.decay = rows, width, heads, decay
        self.controller = nn.LSTMCell(features + ways + heads * width, hidden)
        self.interface = nn.Linear(hidden, heads * (width + 2))  # of each head a key, a strength and a gate
        with torch.no_grad():
            self.interface.bias.view(heads, -1)[:, width] = _STRENGTH
        self.out = nn.Linear(hidden + heads * width, ways)

    def begin(self, batch: int, like: Tensor) -> State:
        """The state before a sequence: controller, memory, read weights, usage and what was read."""
        hidden = like.new_zeros(batch, self.controller.hidden_size)
        memory = like.new_full((batch, self.rows, self.width), 1e-6)  # a direction for the cosine
        read = like.new_zeros(batch, self.heads, self.rows)
        usage = like.new_zeros(batch, self.rows)
        found = like.new_zeros(batch, self.heads * self.width)
        return hidden, hidden, memory, read, usage, found

    def run(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        state = self.begin(len(inputs), inputs) if state is None else state
        outputs = []
        for step, x in enumerate(inputs.unbind(1)):
            after = self._step(x, state)
            state = after if lengths is None else _where(step < lengths, after, state)
            outputs.append(torch.cat([state[0], state[-1]], 1))
        return self.out(torch.stack(outputs, 1)), state

    def _step(self, x: Tensor, state: State) -> State:
        hidden, cell, memory, read, usage, found = state
        hidden, cell = self.controller(torch.cat([x, found], 1), (hidden, cell))
        interface = self.interface(hidden).unflatten(1, (self.heads, -1))
        key, strength, gate = interface.split([self.width, 1, 1], -1)
        key, strength, gate = key.tanh(), 1 + F.softplus(strength), gate.sigmoid()  # [B, heads, ...]
        now = (strength * (1 - pairwise_distance(key, memory, "cosine"))).softmax(-1)  # [B, heads, rows]
        least = usage.topk(self.heads, largest=False).indices  # [B, heads], which has no gradient
        unused = one_hot(least, self.rows).to(memory.dtype)
        write = gate * read + (1 - gate) * unused
        memory = memory * (1 - unused.sum(1)).unsqueeze(-1) + write.mT @ key
        usage = self.decay * usage + (now + write).sum(1)
        return hidden, cell, memory, now, usage, (now @ memory).flatten(1)

    @classmethod
    def from_settings(cls, settings: MANNSettings, problem: Problem) -> MANN:
        backbone, (features,) = settings.build(problem)
        sizes = {"hidden": settings.units, "rows": settings.rows, "width": settings.width}
        return cls(backbone, features, problem.outputs, heads=settings.heads, **sizes)


def _where(chosen: Tensor, state: State, other: State) -> State:
    """chosen [B]: of which sequences ``state`` is taken."""
    return tuple(
        torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(state, other, strict=True)
    )
