"""`adapt`: the inner loop of any `torch.nn.Module`, for all tasks at once."""

from __future__ import annotations

from .adapt import Adapted, Explanation, adapt, explain

__all__ = ["Adapted", "Explanation", "adapt", "explain"]
