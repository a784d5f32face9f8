"""Evaluation of what reads an episode as a sequence: accuracy at each example of a class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from metafast.data.sources import Images
from metafast.methods.sequence import RecurrentLearner
from metafast.program.config import Config
from metafast.program.evaluate import Estimate, estimate
from metafast.settings import Count, setting

from .images import OnImages


@dataclass(frozen=True, kw_only=True)
class OnSequences(OnImages):
    """Accuracy over episodes, and over the first, second, ... example of a class in a sequence."""

    name = "images in sequence"

    ways: Count | None = setting(None, "classes of a task; with an inner loop else as trained")

    def _measure(self, method: RecurrentLearner, trained: Config, device: str) -> None:
        super()._measure(method, trained, device)
        means = self._by_instance(method, trained.data, device)
        print(
            f"sequences of {len(means)} examples of {trained.data.ways} classes each, accuracy by instance "
            f"in %: {' '.join(f'{100 * mean.mean:.1f}' for mean in means)}"
        )

    def draw(self, method: RecurrentLearner, data: Images, device: str) -> None:
        from metafast.program.figures import draw_by_instance

        title = f"{data.ways} classes of {data} {self.split}, in sequence"
        draw_by_instance(self._by_instance(method, data, device), 1 / data.ways, self.figure, title=title)

    def _by_instance(self, method: RecurrentLearner, data: Images, device: str) -> list[Estimate]:
        sampler = replace(data, tasks=1).sampler(self.split, seed=self.seed, device=device)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            rows = torch.cat([method.accuracy_by_instance(episodes) for episodes in self._batches(sampler)])
        return [estimate(column) for column in rows.unbind(1)]
