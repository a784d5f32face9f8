"""Fused C++/CUDA operations for meta-learning that drop into existing PyTorch code."""

from __future__ import annotations

from importlib.metadata import version

# isort: off
from metafast._dispatch import load  # noqa: F401  (first: it registers the ops)

# isort: on
from metafast import reference
from metafast._dispatch import batching, fakes
from metafast._dispatch.doors import trace_doors
from metafast._dispatch.info import info
from metafast.adaptation import Adapted, Explanation, adapt, explain
from metafast.ops.convolutional import ConvBlock, conv_forward, conv_inner_sgd, task_conv2d
from metafast.ops.inner_loop import (
    get_trajectory_bytes,
    inner_sgd,
    maml_loss,
    maml_value_and_grad,
    set_trajectory_bytes,
    sgd_update,
    task_linear,
)
from metafast.ops.learned_optimizer import (
    lstm_optimizer_state,
    lstm_optimizer_step,
    lstm_optimizer_step_,
    lstm_optimizer_unroll,
    meta_lstm_state,
    meta_lstm_step,
    meta_lstm_step_,
    meta_lstm_unroll,
    state_views,
)
from metafast.ops.pairwise import (
    matching_log_probs,
    matching_loss,
    pairwise_distance,
    prototypes,
    prototypical_log_probs,
    prototypical_loss,
    relation_scores,
)
from metafast.optim import CoordinatewiseLSTM, LSTMOptimizer, MetaLSTM

__version__ = version("metafast")

fakes.register("metafast")
_batching = batching.register("metafast")

__all__ = [
    "Adapted",
    "ConvBlock",
    "CoordinatewiseLSTM",
    "Explanation",
    "LSTMOptimizer",
    "MetaLSTM",
    "adapt",
    "conv_forward",
    "conv_inner_sgd",
    "explain",
    "get_trajectory_bytes",
    "info",
    "inner_sgd",
    "lstm_optimizer_state",
    "lstm_optimizer_step",
    "lstm_optimizer_step_",
    "lstm_optimizer_unroll",
    "maml_loss",
    "maml_value_and_grad",
    "matching_log_probs",
    "matching_loss",
    "meta_lstm_state",
    "meta_lstm_step",
    "meta_lstm_step_",
    "meta_lstm_unroll",
    "pairwise_distance",
    "prototypes",
    "prototypical_log_probs",
    "prototypical_loss",
    "reference",
    "relation_scores",
    "set_trajectory_bytes",
    "sgd_update",
    "state_views",
    "task_conv2d",
    "task_linear",
    "trace_doors",
]
