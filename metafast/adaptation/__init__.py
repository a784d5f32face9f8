"""`adapt`: the inner loop of any `torch.nn.Module`, for all tasks."""

from __future__ import annotations

from .adapt import Adapted, adapt
from .explain import Explanation, explain

__all__ = ["Adapted", "Explanation", "adapt", "explain"]
