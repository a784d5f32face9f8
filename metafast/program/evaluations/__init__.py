"""What `metafast eval` measures, for each kind of run: settings, and the lines that they print."""

from __future__ import annotations

from metafast.data.sources import Sine
from metafast.methods import Adaptation, ImaginaryData, LearnedOptimizer, Learner, Siamese
from metafast.methods.sequence import RecurrentLearner
from metafast.program.config import Config

from .base import Evaluation, Several
from .images import OnBenchmark, OnImages, OnImagesAdapting
from .imagined import OnImagined
from .pairs import OnPairs
from .problems import OnProblems
from .sequences import OnSequences
from .waves import WAVE_SHOTS, WAVE_STEPS, OnWaves, draw_typical, wave_errors

EVALUATIONS = (
    OnImages,
    OnImagesAdapting,
    OnPairs,
    OnSequences,
    OnImagined,
    OnBenchmark,
    OnWaves,
    OnProblems,
)


def evaluation_of(method: Learner, trained: Config, *, runs: bool) -> type[Evaluation]:
    """The kind of evaluation that a method, and what it learned from, ask for."""
    if isinstance(method, LearnedOptimizer):
        return OnProblems
    if isinstance(trained.data, Sine):
        return OnWaves
    if runs:
        return OnBenchmark
    kinds = {
        Adaptation: OnImagesAdapting,
        Siamese: OnPairs,
        RecurrentLearner: OnSequences,
        ImaginaryData: OnImagined,
    }
    return next((kind for methods, kind in kinds.items() if isinstance(method, methods)), OnImages)


__all__ = [
    "EVALUATIONS",
    "WAVE_SHOTS",
    "WAVE_STEPS",
    "Evaluation",
    "Several",
    "draw_typical",
    "evaluation_of",
    "wave_errors",
]
