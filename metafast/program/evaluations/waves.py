"""Evaluation on sine waves: squared error after steps of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from metafast.data import Episodes
from metafast.methods import Adaptation
from metafast.program.config import Config
from metafast.program.evaluate import Estimate, evaluate
from metafast.settings import Count, Seed, Whole, setting

from .base import OfEpisodes, Several, samplers_of

WAVE_SHOTS, WAVE_STEPS = (5, 10), (1, 5, 10, 32)


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


def wave_errors(method: Adaptation, waves: Episodes, steps: Sequence[int]) -> list[Estimate]:
    """The mean squared error after each of so many steps of fine-tuning on the support."""
    return [evaluate(method, [waves], partial(method.predict, steps=count)) for count in steps]
