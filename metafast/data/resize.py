"""Antialiased image resizing by exact area weights."""

from __future__ import annotations

import torch
from torch import Tensor


def _overlaps(source: int, target: int) -> Tensor:
    """[target, source]: the share of target pixel i's extent that source pixel j covers; rows sum to 1."""
    scale = source / target
    left = torch.arange(target, dtype=torch.float64)[:, None] * scale
    pixel = torch.arange(source, dtype=torch.float64)
    covered = torch.minimum(left + scale, pixel + 1) - torch.maximum(left, pixel)
    return (covered.clamp(min=0) / scale).to(torch.float32)


def resize_area(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes by the box (area) filter: a target pixel is the mean of the source over the area it covers.

    Source pixels on a target pixel's border count by the fraction inside, so the mean is exact for any ratio,
    such as 105 to 28. (``F.interpolate(mode="area")`` counts border pixels in full.)

    Args:
        images: float32 [..., H, W].

    Returns:
        float32 [..., height, width].
    """
    if images.shape[-2:] == (height, width):
        return images
    rows = _overlaps(images.shape[-2], height).to(images.device)
    columns = _overlaps(images.shape[-1], width).to(images.device)
    with torch.autocast(images.device.type, enabled=False):  # images are data, whoever loads them
        return rows @ (images @ columns.mT)
