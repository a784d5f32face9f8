"""Evaluation on sine waves: squared error after steps of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from metafast.data import Episodes
from metafast.data.sources import Sine
from metafast.methods import Adaptation
from metafast.program.config import Config
from metafast.program.evaluate import Estimate, evaluate, score
from metafast.settings import Count, Seed, Whole, setting

from .base import OfEpisodes, Several, samplers_of

WAVE_SHOTS, WAVE_STEPS = (5, 10), (1, 5, 10, 32)
_CANDIDATES = 21  # waves, of which one is drawn
_CURVES = (0, 1, 5, 10)  # steps that are drawn


@dataclass(frozen=True, kw_only=True)
class OnWaves(OfEpisodes):
    """Squared error: a line for each number of points, a column for each number of steps; the same waves."""

    name = "sine waves"

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(600, "episodes, waves or problems")
    shots: tuple[Count, ...] = setting(WAVE_SHOTS, "support examples of a class, or of a wave")
    queries: Count = setting(100, "query examples of a class, or of a wave")
    inner_steps: tuple[Whole, ...] = setting(WAVE_STEPS, "steps of adaptation; else as trained")
    figure: Path | None = setting(None, "draw what the method does")

    def __call__(self, method: Adaptation, trained: Config, device: str) -> None:
        samplers = samplers_of(
            trained.data,
            self.shots,
            self.split,
            self.seed,
            device,
            queries=self.queries,
            tasks=self.episodes,
        )
        print(f"Mean squared error of {trained.method} on {self.episodes} waves, after steps of fine-tuning:")
        print("points" + "".join(f"{steps:>17}" for steps in self.inner_steps))
        with self.autocast(trained, device):
            for shots, sampler in samplers.items():
                errors = wave_errors(method, sampler.batch(0), self.inner_steps)
                print(f"{shots:>6}" + "".join(f"{error:>9.3f}" for error in errors))
        if self.figure is not None:
            draw_typical({trained.method: method}, self.figure, split=self.split, device=device)
            print(f"{self.figure}: a new wave, before and after fine-tuning")


def wave_errors(method: Adaptation, waves: Episodes, steps: Sequence[int]) -> list[Estimate]:
    """The mean squared error after each of so many steps of fine-tuning on the support."""
    return [evaluate(method, [waves], partial(method.predict, steps=count)) for count in steps]


@torch.no_grad()
def draw_typical(
    methods: Mapping[str, Adaptation], path: Path, *, split: str = "test", device: str = "cpu"
) -> None:
    """Draws the wave on which the first method does as it does in the median of some."""
    from metafast.program.figures import draw_waves

    sizes = {"shots": 5, "queries": 200, "tasks": _CANDIDATES}
    drawn = Sine(**sizes).sampler(split, seed=1, device=device).batch(0)
    first = next(iter(methods.values()))
    errors = score(first, drawn, partial(first.predict, steps=_CURVES[-1]))
    middle = errors.argsort(stable=True)[_CANDIDATES // 2]
    typical = drawn.take(middle.unsqueeze(0))
    curves = {
        label: {steps: method.predict(typical, steps) for steps in _CURVES}
        for label, method in methods.items()
    }
    draw_waves(
        typical, curves, path, title="A new wave, learned from five points; with the mean squared error"
    )
