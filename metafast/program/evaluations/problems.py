"""Evaluation of a learned optimizer: the loss that it leaves on new problems, beside its rivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from metafast.data.sources import TASKS, Problems
from metafast.methods import LearnedOptimizer
from metafast.program.config import Config
from metafast.program.evaluate import estimate
from metafast.program.learning_curves import RATES, RIVALS, learned, learning_curves, tune
from metafast.settings import Count, Seed, setting

from .base import Evaluation, Several

_PROBLEMS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class OnProblems(Evaluation):
    """For each number of steps a line for the learned optimizer and one for each rival: the same problems."""

    name = "problems of l2l"

    split: str = setting("test", "of the data")
    seed: Seed = setting(1, "of the episodes")
    episodes: Several = setting(64, "episodes, waves or problems")
    task: Literal[tuple(TASKS)] | None = setting(
        None, "what an optimizer of l2l is tried on; else as trained"
    )
    batch_size: Count | None = setting(
        None, "examples that a network of the task sees in a step; else as trained"
    )
    inner_steps: tuple[Count, ...] | None = setting(None, "steps of adaptation; else as trained")
    figure: Path | None = setting(None, "draw the learning curves of l2l and of its rivals")

    def __call__(self, method: LearnedOptimizer, trained: Config, device: str) -> None:
        lengths = self.inner_steps or (trained.data.inner_steps,)
        if self.figure is not None and len(lengths) > 1:
            raise ValueError(f"figure: expected one number of inner steps, got {' '.join(map(str, lengths))}")
        tried = self._tried_on(trained.data)
        for steps in lengths:
            batches = self._problems(replace(tried, inner_steps=steps), device)
            curves = self._compare(method, batches, trained.data.name, tried.name, steps)
        if self.figure is not None:
            from metafast.program.figures import draw_learning_curves

            title = f"{self.episodes} new problems: {tried.name}, {self.split}"
            draw_learning_curves(curves, self.figure, title=title)
            print(f"{self.figure}: the learning curves")

    def _tried_on(self, trained: Problems) -> Problems:
        kind = type(trained) if self.task is None else TASKS[self.task]
        known = kind.__dataclass_fields__
        if self.batch_size is not None and "batch_size" not in known:
            having = " or ".join(name for name, task in TASKS.items() if hasattr(task, "batch_size"))
            raise ValueError(f"batch_size: expected only for {having}, got {self.batch_size} for {kind.name}")
        carried = {
            name: getattr(trained, name) for name in ("batch_size", "data_root") if hasattr(trained, name)
        }
        if self.batch_size is not None:
            carried["batch_size"] = self.batch_size
        return kind(**{name: value for name, value in carried.items() if name in known})

    def _problems(self, source: Problems, device: str) -> list[Any]:
        source = replace(source, tasks=min(self.episodes, _PROBLEMS_AT_ONCE))
        sampler = source.sampler(self.split, seed=self.seed, device=device)
        batches = [sampler.batch(index) for index in range(-(-self.episodes // _PROBLEMS_AT_ONCE))]
        batches[-1] = batches[-1].take(slice(self.episodes - sum(map(len, batches[:-1]))))
        return batches

    def _compare(
        self, method: LearnedOptimizer, batches: list[Any], trained: str, tried: str, steps: int
    ) -> dict[str, torch.Tensor]:
        print(
            f"Loss after {steps} steps on {self.episodes} new problems, {tried} {self.split}; the rivals at "
            f"the best of {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}:"
        )
        curves = {f"l2l ({trained})": learning_curves(batches, learned(method.cell))}
        (ours,) = curves.values()
        print(f"  {next(iter(curves)):22} {estimate(ours[-1]):.3g}")
        for name in RIVALS:
            tuned = tune(batches, name)
            curves[name] = tuned.curves
            settings = ", ".join(f"{key} {value:.3g}" for key, value in tuned.settings.items())
            print(
                f"  {name:22} {estimate(tuned.curves[-1]):.3g}   l2l - {name}: "
                f"{estimate(ours[-1] - tuned.curves[-1]):.3g}   ({settings})"
            )
        return curves
