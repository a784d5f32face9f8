"""Learned optimizers as modules, and a trained one as a `torch.optim.Optimizer`."""

from __future__ import annotations

from .coordinatewise_lstm import CoordinatewiseLSTM
from .lstm_optimizer import LSTMOptimizer
from .meta_lstm import MetaLSTM

__all__ = ["CoordinatewiseLSTM", "LSTMOptimizer", "MetaLSTM"]
