"""The networks of the few-shot papers that embed an example, and a user's own, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from metafast._dispatch.arguments import check_count
from metafast.data import Problem
from metafast.settings import Count, Settings, setting

NETWORKS = ("conv4", "conv4-strided", "resnet12")


def conv4(
    in_channels: int = 1,
    hidden: int = 64,
    *,
    pools: int = 4,
    flatten: bool = True,
    track_running_stats: bool = True,
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm, 2x2 max-pooling and ReLU (Vinyals et al. 2016).

    [B, in_channels, H, W] -> [B, hidden * (H // 16) * (W // 16)]: 28x28 images give D = ``hidden``.

    ReLU follows the pooling rather than precedes it: both are monotone, so the result is the same, on a
    quarter of the elements. The weights are channels-last, the layout of the fast CPU and tensor-core
    convolutions; it carries over to the activations.

    Args:
        pools: how many of the blocks pool, the first ones; Relation Networks have 2.
        flatten: whether the result is flat; else [B, hidden, H // 2^pools, W // 2^pools].
        track_running_stats: of batch norm; without, it goes by the batch in evaluation too.
    """
    check_count(1, in_channels=in_channels, hidden=hidden)
    check_count(pools=pools)
    layers: list[nn.Module] = []
    for block, channels in enumerate((in_channels, hidden, hidden, hidden)):
        layers += [nn.Conv2d(channels, hidden, kernel_size=3, padding=1)]
        layers += [nn.BatchNorm2d(hidden, track_running_stats=track_running_stats)]
        layers += [nn.MaxPool2d(2)] if block < pools else []
        layers += [nn.ReLU(inplace=True)]
    layers += [nn.Flatten()] if flatten else []
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def conv4_strided(
    in_channels: int = 1, hidden: int = 64, *, flatten: bool = True, track_running_stats: bool = True
) -> nn.Sequential:
    """Four blocks of 3x3 convolution of stride 2, batch norm and ReLU, then the mean over the image.

    The network of Finn et al. 2017 for Omniglot (section 5.2). [B, in_channels, H, W] -> [B, hidden].

    Args:
        flatten: whether the result is that mean; else [B, hidden, H', W'], a 16th of H and W, rounded up.
        track_running_stats: of batch norm; without, it goes by the batch in evaluation too.
    """
    check_count(1, in_channels=in_channels, hidden=hidden)
    layers: list[nn.Module] = []
    for channels in (in_channels, hidden, hidden, hidden):
        layers += [nn.Conv2d(channels, hidden, kernel_size=3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(hidden, track_running_stats=track_running_stats), nn.ReLU(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if flatten else []
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def resnet12(
    in_channels: int = 3, hidden: int = 64, *, flatten: bool = True, track_running_stats: bool = True
) -> nn.Sequential:
    """ResNet-12 with widths 64, 160, 320 and 640 (Oreshkin et al. 2018, Lee et al. 2019), without DropBlock.

    [B, in_channels, H, W] -> [B, 10 * hidden], the mean over the image.

    Args:
        hidden: width of the first block; the others are 2.5, 5 and 10 times as wide.
        flatten: whether the result is that mean; else [B, 10 * hidden, H // 16, W // 16].
        track_running_stats: of batch norm; without, it goes by the batch in evaluation too.
    """
    check_count(1, in_channels=in_channels, hidden=hidden)
    widths = [hidden, hidden * 5 // 2, hidden * 5, hidden * 10]
    blocks = (
        _ResidualBlock(channels, width, track_running_stats)
        for channels, width in zip([in_channels, *widths[:-1]], widths, strict=True)
    )
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if flatten else []
    return nn.Sequential(*blocks, *head).to(memory_format=torch.channels_last)


class _ResidualBlock(nn.Module):
    """Three convolutions beside one, and 2x2 max-pooling of their sum."""

    def __init__(self, channels: int, width: int, track_running_stats: bool) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, width, track_running_stats=track_running_stats)
        layers: list[nn.Module] = []
        for inputs in (channels, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), norm()]
            layers += [nn.LeakyReLU(0.1)]
        self.convolutions = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm())
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.convolutions(x) + self.shortcut(x))


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(Settings):
    """Of the methods that embed examples."""

    backbone: str = setting(
        "conv4",
        "what embeds an example: conv4, conv4-strided, resnet12, or FILE.py:FUNCTION, which takes the shape "
        "of an example and returns a module",
    )
    hidden: Count = setting(64, "channels of conv4 and conv4-strided, or of resnet12's first block")

    def build(
        self, problem: Problem, *, maps: bool = False, pools: int | None = None
    ) -> tuple[nn.Module, tuple[int, ...]]:
        """The backbone for the examples of a problem, and the shape of an embedding."""
        if len(problem.input_shape) == 1:  # vectors are embeddings
            return nn.Identity(), problem.input_shape
        return build_backbone(self.backbone, problem.input_shape, self.hidden, maps=maps, pools=pools)


def build_backbone(
    name: str,
    shape: tuple[int, ...],
    hidden: int,
    *,
    maps: bool = False,
    pools: int | None = None,
    others: Sequence[str] = (),
    track_running_stats: bool = True,
) -> tuple[nn.Module, tuple[int, ...]]:
    """The backbone of this name for examples of a shape, and the shape of an embedding.

    Args:
        hidden: channels of conv4 and conv4-strided, or of resnet12's first block.
        maps: [C, H, W] is wanted instead of [D].
        pools: blocks of conv4 that pool; default: 2 for maps, else 4.
        others: names that the caller knows besides, for a message.
        track_running_stats: of the batch norm of these.

    Raises:
        ValueError: there is no such backbone, or it does not fit the examples.
    """
    if ":" in name:
        network = _factory(name)(shape)
    elif name not in NETWORKS:
        known = ", ".join((*others, *NETWORKS))
        raise ValueError(f"backbone: expected {known} or FILE.py:FUNCTION, got {name or repr('')}")
    elif len(shape) != 3:
        known = " or ".join((*others, "FILE.py:FUNCTION"))
        raise ValueError(f"backbone: expected {known} for examples that are no images, got {name}")
    elif min(shape[1:]) < 16:
        raise ValueError(
            f"image_size: expected at least 16, which {name} halves four times, got {min(shape[1:])}"
        )
    elif name != "conv4":
        build = resnet12 if name == "resnet12" else conv4_strided
        network = build(shape[0], hidden, flatten=not maps, track_running_stats=track_running_stats)
    else:
        pools = (2 if maps else 4) if pools is None else pools
        network = conv4(
            shape[0], hidden, pools=pools, flatten=not maps, track_running_stats=track_running_stats
        )
    found = _embedding_shape(network, shape)
    if len(found) != (3 if maps else 1):
        wanted = "[B, C, H, W]" if maps else "[B, D]"
        got = ", ".join(map(str, ("B", *found)))
        raise ValueError(f"backbone: expected a result of shape {wanted}, got [{got}]")
    return network, found


def _factory(name: str) -> Callable[[tuple[int, ...]], nn.Module]:
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"backbone: expected FILE.py:FUNCTION, got {name}, and there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"backbone: expected a function of {path}, got {function or repr('')}")
    return getattr(module, function)


@torch.no_grad()
def _embedding_shape(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the network makes of an example, without a trace in it."""
    training = network.training
    embedded = network.eval()(torch.zeros(2, *shape))  # of one, batch norm by the batch may not know
    network.train(training)
    return tuple(embedded.shape[1:])
