"""Pure-PyTorch twins of the compiled operations: same names, same signatures, the definition of correct.

They are differentiable to any order and compose with every transform of ``torch.func``. They trade memory
for plainness (the distances hold a ``[Q, N, D]`` tensor). Of their arguments they check the labels alone, as
the compiled operations do: no wrong one gives a number.
"""

from __future__ import annotations

from .convolutional import ConvBlock, conv_forward, conv_inner_sgd, task_conv2d
from .inner_loop import inner_sgd, maml_loss, sgd_update, task_linear
from .learned_optimizer import (
    lstm_optimizer_step,
    lstm_optimizer_step_,
    lstm_optimizer_unroll,
    meta_lstm_step,
    meta_lstm_step_,
    meta_lstm_unroll,
)
from .pairwise import (
    matching_log_probs,
    matching_loss,
    pairwise_distance,
    prototypes,
    prototypical_log_probs,
    prototypical_loss,
    relation_scores,
)

__all__ = [
    "ConvBlock",
    "conv_forward",
    "conv_inner_sgd",
    "inner_sgd",
    "lstm_optimizer_step",
    "lstm_optimizer_step_",
    "lstm_optimizer_unroll",
    "maml_loss",
    "matching_log_probs",
    "matching_loss",
    "meta_lstm_step",
    "meta_lstm_step_",
    "meta_lstm_unroll",
    "pairwise_distance",
    "prototypes",
    "prototypical_log_probs",
    "prototypical_loss",
    "relation_scores",
    "sgd_update",
    "task_conv2d",
    "task_linear",
]
