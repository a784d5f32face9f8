"""What the kinds of evaluation share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from metafast.data.sources import Images, Sine
from metafast.methods import Learner
from metafast.program.config import Config
from metafast.program.train import PRECISION, Precision, autocast_dtype
from metafast.settings import Range, Seed, Settings, setting

Several = Annotated[int, Range(ge=2)]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Settings, ABC):
    """One kind; ``None``: as trained, or none."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, method: Learner, trained: Config, device: str) -> None:
        """Prints what it measures."""


@dataclass(frozen=True, kw_only=True)
class OfEpisodes(Evaluation):
    precision: Precision | None = setting(None, f"{PRECISION}; else as trained")

    def autocast(self, trained: Config, device: str) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.precision or trained.training.precision, device)
        return torch.autocast(device, dtype, enabled=dtype is not None)


def samplers_of(
    data: Images | Sine, shots: Sequence[int], split: str, seed: Seed, device: str, **sizes: int
) -> dict[int, Any]:
    """One for each number of shots, all made before one is used: what does not fit is said at once."""
    return {
        count: replace(data, shots=count, **sizes).sampler(split, seed=seed, device=device) for count in shots
    }
