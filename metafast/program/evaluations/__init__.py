"""What `metafast eval` measures, for each kind of run: settings, and the lines that they print."""

from __future__ import annotations

from metafast.data.sources import Sine
from metafast.methods import Adaptation, LearnedOptimizer, Learner
from metafast.program.config import Config

from .base import Evaluation, Several
from .images import OnBenchmark, OnImages, OnImagesAdapting
from .problems import OnProblems
from .waves import WAVE_SHOTS, WAVE_STEPS, OnWaves, wave_errors

EVALUATIONS = (OnImages, OnImagesAdapting, OnBenchmark, OnWaves, OnProblems)


def evaluation_of(method: Learner, trained: Config, *, runs: bool) -> type[Evaluation]:
    """The kind of evaluation that a method, and what it learned from, ask for."""
    if isinstance(method, LearnedOptimizer):
        return OnProblems
    if isinstance(trained.data, Sine):
        return OnWaves
    if runs:
        return OnBenchmark
    return OnImagesAdapting if isinstance(method, Adaptation) else OnImages


__all__ = [
    "EVALUATIONS",
    "WAVE_SHOTS",
    "WAVE_STEPS",
    "Evaluation",
    "Several",
    "evaluation_of",
    "wave_errors",
]
