"""Moves drawings to the middle of their images."""

from __future__ import annotations

import torch
from torch import Tensor


def center(images: Tensor) -> Tensor:
    """Moves every image by whole pixels so that its centre of mass lies in the middle; zeros come in.

    For drawings (ink > 0 on paper = 0), whose place says nothing about their class, and for networks that,
    unlike convolutions, would have to learn that. An image without ink stays where it is.

    Args:
        images: float [..., ch, H, W], none of it negative; the channels move together.

    Returns:
        [..., ch, H, W].
    """
    height, width = images.shape[-2:]
    ink = images.sum(-3)  # [..., H, W]
    rows = _sources(ink.sum(-1))  # [..., H]
    columns = _sources(ink.sum(-2))  # [..., W]
    inside = ((rows >= 0) & (rows < height)).unsqueeze(-1) & ((columns >= 0) & (columns < width)).unsqueeze(
        -2
    )
    rows = rows.clamp(0, height - 1)[..., None, :, None].expand(images.shape)
    columns = columns.clamp(0, width - 1)[..., None, None, :].expand(images.shape)
    return images.gather(-2, rows).gather(-1, columns) * inside.unsqueeze(-3)


def _sources(mass: Tensor) -> Tensor:
    """The mass along a side [..., L] -> where each pixel comes from, int64 [..., L], maybe outside."""
    place = torch.arange(mass.shape[-1], device=mass.device)
    middle = (mass.shape[-1] - 1) / 2
    total = mass.sum(-1)
    shift = torch.where(total > 0, (mass * place).sum(-1) / total - middle, 0.0).round().long()
    return place + shift.unsqueeze(-1)
