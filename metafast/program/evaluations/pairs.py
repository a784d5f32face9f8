"""Evaluation of verification: are two images of one class?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from metafast.data import Episodes
from metafast.data.sources import Images
from metafast.methods import Siamese
from metafast.program.config import Config
from metafast.program.evaluate import ErrorRates, error_rates
from metafast.settings import setting

from .images import OnImages

_PAIRS = 8  # of a kind, that are drawn


@dataclass(frozen=True, kw_only=True)
class OnPairs(OnImages):
    """Accuracy over episodes, and how well pairs are told to be same or different."""

    name = "images in pairs"

    verify: tuple[Path, ...] = setting((), "two images: are they of one class?")

    def __call__(self, method: Siamese, trained: Config, device: str) -> None:
        if len(self.verify) not in (0, 2):
            raise ValueError(f"verify: expected two images, got {len(self.verify)}")
        if not self.verify:
            return super().__call__(method, trained, device)
        first, second = (self.read(trained, path).images[0, :1].to(device) for path in self.verify)
        with torch.no_grad(), self.autocast(trained, device):
            chance = float(method.verify(first, second))
        rates = self._rates(method, trained, device)
        accepts, rejects = rates.at(chance)
        print(
            f"{self.verify[0]} and {self.verify[1]}: {'the same' if chance >= 0.5 else 'different'}, "
            f"p(same) = {chance:.3f}\n"
            f"Of pairs of {trained.data} {self.split}, {100 * accepts:.1f} % of the different ones score as "
            f"much or more, {100 * rejects:.1f} % of the same ones less; {_said(rates)}"
        )

    def _measure(self, method: Siamese, trained: Config, device: str) -> None:
        super()._measure(method, trained, device)
        rates = self._rates(method, trained, device)
        right = 1 - sum(rates.at(0.5)) / 2
        print(
            f"verification of pairs of {trained.data} {self.split}, half of them same: {100 * right:.2f} % "
            f"right; {_said(rates)}"
        )

    def _rates(self, method: Siamese, trained: Config, device: str) -> ErrorRates:
        data = replace(trained.data, ways=self.ways or trained.data.ways)
        with self.autocast(trained, device):
            return self._rates_of(method, data, device)

    def _rates_of(self, method: Siamese, data: Images, device: str) -> ErrorRates:
        data = replace(data, shots=1, queries=1, tasks=1)
        sampler = data.sampler(self.split, seed=self.seed, device=device)
        scores = [_pairs(method, episodes) for episodes in self._batches(sampler)]
        return error_rates(*map(torch.cat, zip(*scores, strict=True)))

    def draw(self, method: Siamese, data: Images, device: str) -> None:
        """Pairs with their scores, and the error rates over all thresholds."""
        from metafast.program.figures import draw_pairs

        data = replace(data, shots=1, queries=1, tasks=1)
        episodes = data.sampler(self.split, seed=self.seed, device=device).batch(0)
        same, different = _pairs(method, episodes)
        shown = min(_PAIRS, len(same))
        x, y = episodes.query[0, :shown], episodes.support[0]
        draw_pairs(
            x.cpu(),
            {"same": (y[:shown].cpu(), same), "different": (y.roll(-1, 0)[:shown].cpu(), different)},
            self._rates_of(method, data, device),
            self.figure,
            title=f"Pairs of {data} {self.split}, and p(same)",
        )


@torch.no_grad()
def _pairs(method: Siamese, episodes: Episodes) -> tuple[Tensor, Tensor]:
    """p(same) of each query of an episode with its class's example, and with the next class's: [N] each.

    The episode has one support and one query example of each class.
    """
    support, query = method.embed(episodes)
    scores = method.logits(query, support)[0].float().sigmoid().cpu()
    return scores.diagonal(), scores.roll(-1, 1).diagonal()


def _said(rates: ErrorRates) -> str:
    threshold, error = rates.equal
    return f"equal error rate {100 * error:.2f} % at p = {threshold:.2f}"
