"""Evaluation with imagined data and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from metafast.data.sources import Images
from metafast.methods import ImaginaryData, Method

from .images import OnImages


@dataclass(frozen=True, kw_only=True)
class OnImagined(OnImages):
    """Accuracy over episodes, with imagined data and without."""

    name = "images and imagined data"

    def _learners(self, method: ImaginaryData) -> Iterator[tuple[str, Method, Any]]:
        yield "", method, method.predict
        yield ", without imagined data", method.learner, method.learner.predict

    def draw(self, method: ImaginaryData, data: Images, device: str) -> None:
        """Real and imagined examples in the plane in which they differ most."""
        from metafast.program.figures import draw_imagined

        drawn = (
            replace(data, queries=self.queries).sampler(self.split, seed=self.seed, device=device).batch(0)
        )
        with torch.no_grad():
            support, query = method.learner.embed(drawn)
            imagined, labels = method.imagine(support, drawn.support_labels, drawn.num_classes)
        title = f"An episode of {data} {self.split} in the space of embeddings"
        draw_imagined(
            {
                "support": (support[0].cpu(), drawn.support_labels[0].cpu()),
                "imagined": (imagined[0].cpu(), labels[0].cpu()),
                "query": (query[0].cpu(), drawn.query_labels[0].cpu()),
            },
            self.figure,
            title=title,
        )
