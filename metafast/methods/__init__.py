"""The methods, one file each, thin over the fused operations.

To add one: write a class that satisfies :class:`Method` in a file of its own and enter it in ``METHODS``. The
command line then trains, resumes and evaluates it, with the options that the class declares.
"""

from __future__ import annotations

from .adaptation import Adaptation
from .conv4 import conv4
from .fomaml import FOMAML
from .learned_optimizer import LearnedOptimizer
from .maml import MAML
from .meta_lstm import MetaLSTMLearner
from .metasgd import MetaSGD
from .method import Learner, Method
from .mlp import mlp
from .pretrain import Pretrain
from .protonet import ProtoNet
from .reptile import Reptile

METHODS: dict[str, type[Learner]] = {
    "protonet": ProtoNet,
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "metasgd": MetaSGD,
    "meta-lstm": MetaLSTMLearner,
    "pretrain": Pretrain,
    "l2l": LearnedOptimizer,
}

__all__ = [
    "FOMAML",
    "MAML",
    "METHODS",
    "Adaptation",
    "LearnedOptimizer",
    "Learner",
    "MetaLSTMLearner",
    "MetaSGD",
    "Method",
    "Pretrain",
    "ProtoNet",
    "Reptile",
    "conv4",
    "mlp",
]
