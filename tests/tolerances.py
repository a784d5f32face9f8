"""How far a result may be from the float64 reference on the same inputs, by dtype, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# (rtol, atol)
TOLERANCES = {
    # Sums of a few hundred terms of order 1 in another order: some hundred units in the last place.
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 1e-5),
    # Computed in float32 and rounded once on the way out, half a unit in the last place (2^-11 and 2^-8); a
    # gradient also starts from a forward result that was rounded. Twice a unit covers both.
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
# float32 whose products torch's library rounds to TF32, 10 bits of mantissa: a factor is off by 2^-11, half a
# unit, and a sum of 30 products of order 1 by up to 0.006 in the rows of the contract.
TF32 = (1e-2, 1e-2)


def assert_close(actual: Any, expected: Any, tolerance: torch.dtype | tuple[float, float]) -> None:
    """Compares tensors, or sequences of them, with float64 ones."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    rtol, atol = TOLERANCES[tolerance] if isinstance(tolerance, torch.dtype) else tolerance
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            one.cpu().double(), other.cpu().double(), rtol=rtol, atol=atol, equal_nan=True
        )
