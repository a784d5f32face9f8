"""What needs no learning: the accuracy that a learned embedding must beat."""

from __future__ import annotations

import torch

from .episodes import Episodes


def pixel_floor(episodes: Episodes, metric: str = "cosine") -> float:
    """Query accuracy of the nearest support example in raw pixels, over all tasks, in 0..1.

    Args:
        episodes: support [T, S, ...], query [T, Q, ...], with labels.
        metric: ``"cosine"`` (similarity of the flattened images) or ``"euclidean"``.
    """
    support, query = episodes.support.flatten(2), episodes.query.flatten(2)
    if metric == "cosine":
        support = torch.nn.functional.normalize(support, dim=-1)
        distance = -query @ support.mT  # the query's own norm does not change its nearest neighbour
    elif metric == "euclidean":
        distance = torch.cdist(query, support)
    else:
        raise ValueError(f"metric: expected 'cosine' or 'euclidean', got {metric!r}")
    predicted = episodes.support_labels.gather(1, distance.argmin(-1))
    return float((predicted == episodes.query_labels).double().mean())
