"""Episodes for few-shot learning: labelled images as one tensor, and batches of tasks drawn from them."""

from .classes import ImageClasses
from .digits import digits
from .episodes import Episodes
from .image_folder import image_folder
from .omniglot import omniglot, omniglot_runs
from .sampler import EpisodeSampler

__all__ = [
    "EpisodeSampler",
    "Episodes",
    "ImageClasses",
    "digits",
    "image_folder",
    "omniglot",
    "omniglot_runs",
]
