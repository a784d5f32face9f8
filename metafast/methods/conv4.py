"""The backbone of the few-shot papers."""

from __future__ import annotations

import torch
from torch import nn

from metafast._dispatch.arguments import check_count


def conv4(in_channels: int = 1, hidden: int = 64) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm, 2x2 max-pooling and ReLU (Vinyals et al. 2016).

    [B, in_channels, H, W] -> [B, hidden * (H // 16) * (W // 16)]: 28x28 images give D = ``hidden``.

    ReLU follows the pooling rather than precedes it: both are monotone, so the result is the same, on a
    quarter of the elements. The weights are channels-last, the layout of the fast CPU and tensor-core
    convolutions; it carries over to the activations.
    """
    check_count(1, in_channels=in_channels, hidden=hidden)
    layers: list[nn.Module] = []
    for channels in (in_channels, hidden, hidden, hidden):
        layers += [
            nn.Conv2d(channels, hidden, kernel_size=3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)
