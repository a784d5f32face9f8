"""The methods, one file each, thin over the fused operations.

To add one, write a file and enter its class in ``METHODS``:

1. a frozen dataclass of :class:`metafast.settings.Settings` with the method's own settings: type, default and
   meaning of each (``hidden: Count = setting(64, "channels of Conv4")``);
2. a class of :class:`Method` with ``loss`` and ``predict``, which takes the user's own network;
3. in the class: ``Settings``, the ``paper``, the ``recipes`` (for each kind of data that it learns from,
   ``"images"`` or ``"sine"``, the settings of method, data, training and pace whose defaults differ), and
   ``from_settings``, which builds it with the paper's network.

The command line trains, resumes, evaluates and lists it; its options, their help and checks, and the run's
``config.json`` follow from the settings. ``protonet.py`` is the shortest example.
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
