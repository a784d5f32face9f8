"""Counter-based random numbers and exact sampling without replacement, in whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2^64: torch has no full uint64 arithmetic."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64, a bijection of the 64-bit integers."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _mixed(x: int) -> int:
    """:func:`_mix` of a number that the host knows: as a tensor it would have to be copied to a device."""
    x &= _MASK
    x = (x ^ x >> 30) * _MIX_1 & _MASK
    x = (x ^ x >> 27) * _MIX_2 & _MASK
    return _signed(x ^ x >> 31)


def random_bits(seed: int, step: int | Tensor, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Uniform int64 in 0..2^63-1, a pure function of (seed, step, position): the same on every device.

    SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators"), whose state at
    position i is start + i * golden, so that all positions are computed at once. Nothing is copied to the
    device, or waits for it.

    Args:
        step: an int, or several, int64 [B] on ``device``.
        shape: of the bits of a step.

    Returns:
        int64 ``shape``, or [B, *``shape``].
    """
    golden = _signed(_GOLDEN)
    stream = _mixed(seed + _GOLDEN)
    counter = torch.arange(1, torch.Size(shape).numel() + 1, device=device) * golden
    if isinstance(step, Tensor):
        start = _mix(stream + (step + 1) * golden)
        return _shift_right(_mix(start.unsqueeze(-1) + counter), 1).view(*step.shape, *shape)
    start = _mixed(stream + (step + 1) * _GOLDEN)
    return _shift_right(_mix(counter + start), 1).view(shape)


def unit(bits: Tensor) -> Tensor:
    """int64 in 0..2^63-1 -> float32 in [0, 1): the leading 24 bits, all that float32 holds."""
    return (bits >> 39).float() * 2**-24


def open_unit(bits: Tensor) -> Tensor:
    """int64 in 0..2^63-1 -> float32 in (0, 1), never 0 or 1: the last of the 24 bits is set."""
    return unit(bits | 1 << 39)


def check_sizes(**sizes: int) -> None:
    """Raises ``ValueError`` for a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def sample_without_replacement(bits: Tensor, population: Tensor | int) -> Tensor:
    """For each row, K distinct integers out of 0..population-1, every ordered choice equally likely.

    A partial Fisher-Yates shuffle (for i in 0..K-1: swap a[i] with a[r_i], r_i uniform in i..population-1;
    take a[i]) whose array a is never built: what position p holds at step i, the last earlier step j with
    r_j = p put there, and it is what position j held at step j. Following the links to their ends, by pointer
    doubling, takes O(K^2) memory a row and O(log K) tensor operations, whatever the population.

    Args:
        bits: int64 [..., K], uniform in 0..2^63-1.
        population: an int, or int64 broadcastable to [..., 1]; at least K (the caller checks).

    Returns:
        int64 [..., K].
    """
    draws = bits.shape[-1]
    step = torch.arange(draws, device=bits.device)
    target = step + bits % (population - step)  # r_i: [..., K]

    earlier = step[:, None] > step  # [i, j]: step j comes before step i
    none = torch.full((), -1, device=bits.device)
    # The last earlier step that wrote position i, and the one that wrote position r_i; -1 where untouched.
    wrote_own = torch.where((target[..., None, :] == step[:, None]) & earlier, step, none).amax(-1)
    wrote_target = torch.where((target[..., None, :] == target[..., :, None]) & earlier, step, none).amax(-1)

    held = torch.where(wrote_own < 0, step, wrote_own)  # step j leaves behind what position j held at step j
    for _ in range((draws - 1).bit_length()):
        held = held.gather(-1, held)
    return torch.where(wrote_target < 0, target, held.gather(-1, wrote_target.clamp(min=0)))
