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
from .backbones import conv4, conv4_strided, resnet12
from .fomaml import FOMAML
from .imaginary import Hallucinator, ImaginaryData
from .learned_optimizer import LearnedOptimizer
from .maml import MAML
from .mann import MANN
from .matching import FullContext, MatchingNet
from .meta_lstm import MetaLSTMLearner
from .metasgd import MetaSGD
from .method import Learner, Method
from .metric import MetricLearner
from .mlp import mlp
from .pretrain import Pretrain
from .protonet import ProtoNet
from .relation import ConvRelation, LinearRelation, RelationNet
from .reptile import Reptile
from .rnn import RNN
from .sequence import SequenceLearner
from .siamese import Siamese
from .snail import SNAIL

METHODS: dict[str, type[Learner]] = {
    "protonet": ProtoNet,
    "siamese": Siamese,
    "matching": MatchingNet,
    "relation": RelationNet,
    "imaginary": ImaginaryData,
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "metasgd": MetaSGD,
    "meta-lstm": MetaLSTMLearner,
    "pretrain": Pretrain,
    "l2l": LearnedOptimizer,
    "rnn": RNN,
    "mann": MANN,
    "snail": SNAIL,
}

__all__ = [
    "FOMAML",
    "MAML",
    "MANN",
    "METHODS",
    "RNN",
    "SNAIL",
    "Adaptation",
    "ConvRelation",
    "FullContext",
    "Hallucinator",
    "ImaginaryData",
    "LearnedOptimizer",
    "Learner",
    "LinearRelation",
    "MatchingNet",
    "MetaLSTMLearner",
    "MetaSGD",
    "Method",
    "MetricLearner",
    "Pretrain",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "SequenceLearner",
    "Siamese",
    "conv4",
    "conv4_strided",
    "mlp",
    "resnet12",
]
