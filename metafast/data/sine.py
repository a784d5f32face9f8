"""Sine waves: the regression tasks of the MAML paper."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .episodes import Episodes
from .sampling import check_sizes, random_bits, unit

_AMPLITUDES = (0.1, 5.0)
_PHASES = (0.0, math.pi)
_INPUTS = (-5.0, 5.0)
_BLOCK = 64  # steps that are drawn together: a step alone would cost 20 calls of torch for a few numbers each


class SineSampler:
    """Draws ``tasks`` waves y = A sin(x - phase) at a time (Finn, Abbeel, Levine 2017, section 5.1).

    A is uniform in [0.1, 5], the phase in [0, pi], every x in [-5, 5], all independent. As with
    :class:`EpisodeSampler`, ``batch(step)`` is a pure function of (seed, step): a run resumes by continuing
    at its step. On every device a wave has the same A, phase and x; y is as exact as the device's sine.

    Args:
        shots: support examples per wave.
        queries: query examples per wave.
        tasks: T, waves per batch.
        seed: any int; different seeds give independent streams of waves.
        device: where the waves are drawn.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        *,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_sizes(shots=shots, queries=queries, tasks=tasks)
        self.shots = shots
        self.queries = queries
        self.tasks = tasks
        self.seed = seed
        self.device = torch.device(device)
        self._block = -1
        self._drawn = torch.empty(0)

    def batch(self, step: int) -> Episodes:
        """The waves of ``step`` >= 0: support and its labels float32 [T, shots, 1], query [T, queries, 1].

        The tensors are the caller's own: what is done to them changes no other batch.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        block, index = divmod(step, _BLOCK)
        if block != self._block:
            self._drawn = self._draw(block)
            self._block = block
        drawn = self._drawn[index].clone()
        support, query = self.tasks * self.shots, self.tasks * self.queries
        ends = (0, support, 2 * support, 2 * support + query, 2 * support + 2 * query)
        return Episodes(*(drawn[begin:end].view(self.tasks, -1, 1) for begin, end in pairwise(ends)))

    def _draw(self, block: int) -> Tensor:
        """Of each step of a block its support, support labels, query and query labels, in one row."""
        steps = torch.arange(block * _BLOCK, (block + 1) * _BLOCK, device=self.device)
        draws = 2 + self.shots + self.queries
        drawn = unit(random_bits(self.seed, steps, (self.tasks, draws), self.device))  # [block, T, draws]
        amplitude, phase = _between(drawn[..., :1], _AMPLITUDES), _between(drawn[..., 1:2], _PHASES)
        x = _between(drawn[..., 2:], _INPUTS)
        y = amplitude * torch.sin(x - phase)
        support, query = x.split([self.shots, self.queries], -1)
        support_labels, query_labels = y.split([self.shots, self.queries], -1)
        return torch.cat([part.flatten(1) for part in (support, support_labels, query, query_labels)], 1)


def _between(share: Tensor, interval: tuple[float, float]) -> Tensor:
    low, high = interval
    return low + (high - low) * share
