"""Episodes for few-shot learning: batches of tasks, drawn from labelled images or from sine waves."""

from .classes import ImageClasses
from .digits import digits
from .episodes import Episodes, Problem
from .gaussians import GaussianSampler
from .image_folder import image_folder
from .omniglot import omniglot, omniglot_runs
from .optimizees import Optimizees, QuadraticSampler, ScaledSampler, TrainingSampler
from .sampler import EpisodeSampler
from .sine import SineSampler

__all__ = [
    "EpisodeSampler",
    "Episodes",
    "GaussianSampler",
    "ImageClasses",
    "Optimizees",
    "Problem",
    "QuadraticSampler",
    "ScaledSampler",
    "SineSampler",
    "TrainingSampler",
    "digits",
    "image_folder",
    "omniglot",
    "omniglot_runs",
]
