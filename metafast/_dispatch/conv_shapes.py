"""The shapes of a convolutional network's maps and parameters, as csrc/convolutional lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_NUMBERS = 17  # of a block: see csrc/library.cpp
_FEW_TERMS = 36


@dataclass(frozen=True)
class Block:
    channels: int
    width: int  # channels of the result
    norm: bool
    thin: bool  # whether what the convolution gives is not kept: of the first block, in few terms
    packed: int  # elements of its parameters
    weight: int  # and of its weight alone
    padding: tuple[int, int]  # around its input
    convolved: tuple[int, int]  # height and width of what the convolution gives
    size: tuple[int, int]  # of the result


def blocks_of(network: Sequence[int], params: Sequence[Tensor], x: Tensor) -> list[Block]:
    """The blocks of the network that the numbers describe, for images x [T, B, C, H, W]."""
    blocks, size, first, channels = [], x.shape[3:], 0, x.shape[2]
    for start in range(0, len(network), _NUMBERS):
        numbers = network[start : start + _NUMBERS]
        kernel, stride, padding, pool, pool_kernel = (numbers[i : i + 2] for i in (0, 2, 4, 9, 10))
        linear = kernel[0] == 0
        width = params[first].shape[-2 if linear else -4]
        inputs = params[first].shape[-1] if linear else params[first].shape[-3:].numel()
        vectors = numbers[6] + 2 * (numbers[7] == 2)  # bias; gamma and beta
        convolved = _after(size, size if linear else kernel, stride, padding)
        size = convolved
        if pool[0]:
            window = pool_kernel if pool_kernel[0] else convolved
            size = _after(convolved, window, numbers[12:14], numbers[14:16])
        thin = start == 0 and _is_thin(numbers, x)
        weight = inputs * _pitch(width)
        packed = weight + vectors * _pitch(width)
        norm = numbers[7] > 0
        blocks.append(Block(channels, width, norm, thin, packed, weight, tuple(padding), convolved, size))
        first += 1 + vectors
        channels = width
    return blocks


def _is_thin(numbers: Sequence[int], x: Tensor) -> bool:
    """See csrc/convolutional/network.cpp."""
    kernel, stride, norm, pooling = numbers[:2], numbers[2:4], numbers[7], numbers[9:16]
    if x.device.type == "cpu":
        return 0 < kernel[0] * kernel[1] * x.shape[2] <= _FEW_TERMS
    largest_of_squares = [1, 2, 2, 2, 2, 0, 0]
    grey = x.shape[2] == 1 and list(kernel) == [3, 3] and list(stride) == [1, 1]
    return grey and norm > 0 and list(pooling) == largest_of_squares


def activations(blocks: Sequence[Block], tasks: int, images: int, in_pairs: bool) -> int:
    """The elements that a forward keeps: of each block one map or two, and of a norm three statistics.

    in_pairs: whether blocks whose channels allow it hold what products multiply in pairs of bfloat16, their
    weights beside the parameters (csrc/convolutional/params.h).
    """
    total = 0
    pairs = [in_pairs and block.channels % 32 == block.width % 32 == 0 for block in blocks[1:]]
    paddings = [block.padding for block in blocks[1:]] + [(0, 0)]
    after = zip(blocks, paddings, [False, *pairs], [*pairs, False], strict=True)
    for block, (rows, columns), paired, pairs_next in after:
        pitch = _pitch(block.width)
        height, width = block.size[0] + 2 * rows, block.size[1] + 2 * columns
        maps = [height * width * (pitch // 2 if pairs_next else pitch)]
        if not block.thin:
            maps.append(block.convolved[0] * block.convolved[1] * pitch)
        total += sum(tasks * _pitch(images * numbers) for numbers in maps)
        total += 3 * tasks * pitch * block.norm
        total += tasks * block.weight // 2 if paired else 0
    return total


def _pitch(elements: int) -> int:
    return (elements + 15) // 16 * 16


def _after(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    numbers = zip(size, kernel, stride, padding, strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in numbers)
