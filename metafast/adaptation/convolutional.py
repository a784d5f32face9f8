"""Convolutional networks as the fused inner loop knows them, behind a body that does not adapt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

from torch import Tensor, nn

from metafast.adaptation.chain import Known, add_params, layer_name
from metafast.adaptation.states import Tensors
from metafast.adaptation.tracing import Layers
from metafast.reference.convolutional import ConvBlock, layers_of

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvNet(Known):
    """Its parameters are those of the blocks: weight, bias, gamma and beta, as far as a block has them."""

    blocks: tuple[ConvBlock, ...]
    norms: dict[int, tuple[str, nn.BatchNorm2d]]  # by the number of the block, with the prefix of its names

    op: ClassVar[str] = "conv_inner_sgd"
    example: ClassVar[str] = "C, H, W"

    @property
    def layers(self) -> list[int]:
        return layers_of(self.blocks)

    @property
    def affine(self) -> bool:
        """Has a norm parameters, which are a layer of their own among the module's?"""
        return any(norm.weight is not None for _, norm in self.norms.values())

    def by_running(self) -> dict[int, tuple[str, nn.BatchNorm2d]]:
        """Those of the norms that go by their running statistics, as in evaluation, where they keep any."""
        return {
            number: (name, norm)
            for number, (name, norm) in self.norms.items()
            if not norm.training and norm.running_mean is not None
        }

    def folded(self, params: Tensors, buffers: Tensors) -> tuple[list[ConvBlock], list[Tensor]]:
        """The blocks and their parameters, where norms by running statistics are parts of the convolutions.

        A block has the weight s W and the bias s (b - mean) + beta then, with s = gamma / sqrt(var + eps).

        Args:
            params, buffers: Of the tasks, by their names, each [T, ...].
        """
        given, running = iter(self.params), self.by_running()
        blocks, theta = [], []
        for number, block in enumerate(self.blocks):
            of = {part: params[next(given)] for part in block.parameters}
            if number in running:
                name, norm = running[number]
                seen = (buffers[f"{name}running_{part}"] for part in ("mean", "var"))
                mean, var = (statistic.to(of["weight"].dtype) for statistic in seen)
                scale = (var + norm.eps).rsqrt() * of.get("gamma", 1)
                bias = scale * (of.get("bias", 0) - mean) + of.get("beta", 0)
                of = {"weight": of["weight"] * scale[..., None, None, None], "bias": bias}
                block = replace(block, bias=True, norm=False)
            blocks.append(block)
            theta += of.values()
        return blocks, theta

    def check(self, images: Tensor) -> None:
        """Refuses images [T, S, C, H, W] that do not fit, where torch refuses them on the other paths."""
        _, count, channels, *size = images.shape
        by_batch = self.norms.keys() - self.by_running().keys()
        weights = [(n, p) for n, p in self.params.items() if p.dim() > 1]
        if weights[0][1].shape[1] != channels:
            shapes = f"{list(weights[0][1].shape)}, got {list(images.shape)}"
            raise ValueError(f"x: expected images of as many channels as {weights[0][0]} takes, {shapes}")
        maps = [channels, *size]
        for (number, block), (name, weight), (convolved, after) in zip(
            enumerate(self.blocks), weights, self._sizes(size), strict=True
        ):
            if block.kernel is None and weight.shape[1] != math.prod(maps):
                raise ValueError(
                    f"x: expected images that give {name} the {weight.shape[1]} features it takes, got "
                    f"{list(images.shape)}, whose maps there are {' x '.join(map(str, maps))}"
                )
            maps = [weight.shape[0], *after]
            if number in by_batch and count * convolved[0] * convolved[1] == 1:
                raise ValueError(
                    f"x: expected more than one value per channel for {layer_name(*self.norms[number])}, got "
                    "one image whose maps are 1 x 1 there"
                )

    def _sizes(self, size: Sequence[int]) -> Iterator[tuple[Pair, Pair]]:
        """Of each block the height and width of what the convolution gives, and of its result."""
        for block in self.blocks:
            if block.kernel is None:
                convolved = size = (1, 1)
            else:
                convolved = size = _after(size, block.kernel, block.stride, block.padding)
            if block.pool != "none":
                kernel = size if block.pool_kernel is None else block.pool_kernel
                size = _after(size, kernel, block.pool_stride, block.pool_padding)
            yield convolved, size

    def buffers(self, start: Tensors, statistics: Tensor, images: Tensor) -> Tensors:
        """The module's, each [T, ...], after the steps.

        Args:
            start: Those before the first.
            statistics: The means and variances of the batches, [K, 2, T, channels], as of `conv_inner_sgd`.
        """
        found, first = dict(start), 0
        sizes = [convolved for convolved, _ in self._sizes(images.shape[3:])]
        for number, (name, norm) in self.norms.items():
            seen = statistics[..., first : first + norm.num_features]
            first += norm.num_features
            if not (norm.training and norm.track_running_stats and norm.running_mean is not None):
                continue
            pixels = images.shape[1] * sizes[number][0] * sizes[number][1]
            mean, var, count = (
                found[f"{name}{of}"] for of in ("running_mean", "running_var", "num_batches_tracked")
            )
            for of_batch in seen:
                count = count + 1
                share = 1 / count.unsqueeze(-1).to(mean.dtype) if norm.momentum is None else norm.momentum
                mean = mean.lerp(of_batch[0].to(mean.dtype), share)
                unbiased = of_batch[1] * (pixels / max(pixels - 1, 1))
                var = var.lerp(unbiased.to(var.dtype), share)
            found |= {f"{name}running_mean": mean, f"{name}running_var": var}
            found[f"{name}num_batches_tracked"] = count
        return found

    def __str__(self) -> str:
        weights = (p for p in self.params.values() if p.dim() > 1)
        each = [_described(*pair) for pair in zip(self.blocks, weights, strict=True)]
        runs = [(text, len(list(run))) for text, run in groupby(each)]
        chain = "; ".join(f"{count} times {text}" if count > 1 else text for text, count in runs)
        return f"{chain}{self.behind()}"


def parse(head: Layers, adapted: set[str]) -> dict[str, Any] | str:
    """What a `ConvNet` has besides its body; or which layer the kernels do not know, or not there."""
    reader = _Reader(adapted)
    for name, layer in head:
        read = _READERS.get(type(layer))
        if read is None:
            return f"{layer_name(name, layer)} is none of {', '.join(kind.__name__ for kind in _READERS)}"
        if problem := read(reader, name, layer):
            return problem
    last = reader.blocks[-1]
    if last.kernel is not None:
        return f"no Linear follows {reader.last}"
    if last.activation != "none":
        return f"{layer_name(*head[-1])} follows the last Linear"
    return {"params": reader.params, "blocks": tuple(reader.blocks), "norms": reader.norms}


@dataclass(eq=False)
class _Reader:
    """Reads layers one after the other. A method adds one, or says why the kernels do not take it there."""

    adapted: set[str]
    params: dict[str, nn.Parameter] = field(default_factory=dict)
    blocks: list[ConvBlock] = field(default_factory=list)
    norms: dict[int, tuple[str, nn.BatchNorm2d]] = field(default_factory=dict)
    last: str = ""  # what the last convolution or linear layer is called
    flat: bool = False  # whether the maps are flattened

    def _begin(self, name: str, layer: nn.Conv2d | nn.Linear, **block: Any) -> str | None:
        parts = ("weight", "bias") if layer.bias is not None else ("weight",)
        self.blocks.append(ConvBlock(bias=layer.bias is not None, **block))
        self.last = layer_name(name, layer)
        return add_params(self.params, name, layer, parts, self.adapted)

    def _extend(self, **what: Any) -> None:
        self.blocks[-1] = replace(self.blocks[-1], **what)

    def convolution(self, name: str, layer: nn.Conv2d) -> str | None:
        called = layer_name(name, layer)
        if self.flat:
            return f"{called} follows what is flattened"
        if layer.groups != 1 or tuple(layer.dilation) != (1, 1) or layer.padding_mode != "zeros":
            return f"{called} has groups, a dilation or a padding other than zeros"
        padding = layer.padding
        if padding == "same":
            if any(size % 2 == 0 for size in layer.kernel_size):
                return f"{called} pads one side more than the other"
            padding = tuple(size // 2 for size in layer.kernel_size)
        elif padding == "valid":
            padding = (0, 0)
        return self._begin(
            name, layer, kernel=tuple(layer.kernel_size), stride=tuple(layer.stride), padding=tuple(padding)
        )

    def linear(self, name: str, layer: nn.Linear) -> str | None:
        if not self.flat:
            return f"{layer_name(name, layer)} has maps before it that are not flattened"
        return self._begin(name, layer, kernel=None)

    def norm(self, name: str, layer: nn.BatchNorm2d) -> str | None:
        called, block = layer_name(name, layer), self.blocks[-1]
        if (
            block.kernel is None
            or self.flat
            or block.norm
            or block.activation != "none"
            or block.pool != "none"
        ):
            return f"{called} does not follow a Conv2d"
        kept = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if len({tensor is None for tensor in kept}) > 1 or any(layer is n for _, n in self.norms.values()):
            return f"{called} keeps a part of its statistics, or those of two layers"
        if (layer.weight is None) != (layer.bias is None):
            return f"{called} has a weight without a bias, or a bias alone"
        self.norms[len(self.blocks) - 1] = name, layer
        affine = layer.weight is not None
        self._extend(norm=True, affine=affine, eps=layer.eps)
        return add_params(self.params, name, layer, ("weight", "bias") if affine else (), self.adapted)

    def activation(self, name: str, layer: nn.Module) -> str | None:
        if self.blocks[-1].activation != "none":
            return f"{layer_name(name, layer)} is the second activation behind {self.last}"
        self._extend(activation=_ACTIVATIONS[type(layer)], pools_first=self.blocks[-1].pool != "none")
        return None

    def pool(self, name: str, layer: nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d) -> str | None:
        called = layer_name(name, layer)
        if self.blocks[-1].pool != "none" or self.flat:
            return f"{called} does not follow a convolution, or is the second pooling behind it"
        if type(layer) is nn.AdaptiveAvgPool2d:
            if layer.output_size not in (1, (1, 1), [1, 1]):
                return f"{called} has another output than 1"
            self._extend(pool="average")
            return None
        if layer.ceil_mode:
            return f"{called} has ceil_mode"
        padding = _pair(layer.padding)
        if type(layer) is nn.MaxPool2d:
            if layer.return_indices or _pair(layer.dilation) != (1, 1):
                return f"{called} has a dilation, or returns indices"
        elif layer.divisor_override is not None or not (layer.count_include_pad or padding == (0, 0)):
            return f"{called} has a divisor_override, or does not count the padding"
        kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
            return f"{called} pads more than half of its kernel"
        kind = "max" if type(layer) is nn.MaxPool2d else "average"
        self._extend(pool=kind, pool_kernel=kernel, pool_stride=stride, pool_padding=padding)
        return None

    def flatten(self, name: str, layer: nn.Flatten) -> str | None:
        if layer.start_dim != 1 or layer.end_dim not in (-1, 1 if self.flat else 3):
            return f"{layer_name(name, layer)} does not flatten all of an example"
        self.flat = True
        return None


_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}
_READERS: dict[type[nn.Module], Callable[[_Reader, str, Any], str | None]] = {
    nn.Conv2d: _Reader.convolution,
    nn.BatchNorm2d: _Reader.norm,
    nn.ReLU: _Reader.activation,
    nn.Tanh: _Reader.activation,
    nn.MaxPool2d: _Reader.pool,
    nn.AvgPool2d: _Reader.pool,
    nn.AdaptiveAvgPool2d: _Reader.pool,
    nn.Flatten: _Reader.flatten,
    nn.Linear: _Reader.linear,
}


def _pair(size: int | Sequence[int]) -> Pair:
    return (size, size) if isinstance(size, int) else tuple(size)


def _after(size: Sequence[int], kernel: Pair, stride: int | Pair, padding: int | Pair) -> Pair:
    """The height and width of what a window moves over."""
    numbers = zip(size, _pair(kernel), _pair(stride), _pair(padding), strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in numbers)


def _described(block: ConvBlock, weight: Tensor) -> str:
    widths = f"{weight.shape[1]}-{weight.shape[0]}"
    if block.kernel is None:
        words = [f"Linear {widths}"]
    else:
        words = [f"Conv {_by(block.kernel)} {widths}"]
        if block.stride != (1, 1):
            words.append(f"stride {_size(block.stride)}")
    if block.norm:
        words.append("batch norm")
    pool = []
    if block.pool == "average" and block.pool_kernel is None:
        pool = ["global average"]
    elif block.pool != "none":
        pool = [f"{block.pool}-pool {_size(block.pool_kernel)}"]
    activation = {"none": [], "relu": ["ReLU"], "tanh": ["Tanh"]}[block.activation]
    return ", ".join(words + (pool + activation if block.pools_first else activation + pool))


def _by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"


def _size(size: Pair) -> str:
    return str(size[0]) if size[0] == size[1] else _by(size)
