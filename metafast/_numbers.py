"""What holds for the numbers among the options of every optimizer."""

from __future__ import annotations


def check_not_negative(**numbers: object) -> None:
    """Refuses a negative number, as `torch.optim` does. A tensor passes: on CUDA its value is far away."""
    for name, number in numbers.items():
        if isinstance(number, (int, float)) and not number >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number}")
