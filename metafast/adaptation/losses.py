"""The losses of one task that have a name, with weights of its examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.reference.labels import IGNORED, checked_labels


def mse(out: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over examples and outputs: out [S, ...], y [S, ...], weights [S]; 0 for no examples."""
    if out.shape != y.shape:
        raise ValueError(f"y: expected the shape of a task's outputs, {list(out.shape)}, got {list(y.shape)}")
    if weights is None and out.numel():
        return F.mse_loss(out, y)
    of_examples = (out - y).square().flatten(1).mean(1) if out.numel() else out.flatten(1).sum(1)
    return _weighed(of_examples, torch.ones_like(of_examples) if weights is None else weights)


def cross_entropy(out: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the labels that are not ignored: out [S, C, ...], y [S, ...], weights [S]; 0 for none."""
    if y.shape != out.shape[:1] + out.shape[2:] or out.dim() < 2:
        raise ValueError(
            f"y: expected a label for each of a task's outputs {list(out.shape)}, got {list(y.shape)}"
        )
    y = checked_labels("y", y, out.shape[1])
    if weights is None:
        return F.cross_entropy(out, y, reduction="sum") / (y != IGNORED).sum().clamp_min(1)
    counts = (y != IGNORED) * weights.view(-1, *[1] * (y.dim() - 1))
    return _weighed(F.cross_entropy(out, y, reduction="none"), counts)


def _weighed(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total == 0, 1, total)


LOSSES: dict[str, Callable[..., Tensor]] = {"mse": mse, "cross_entropy": cross_entropy}
