"""Which metafast ops a piece of code runs, and with what."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class RecordOps(TorchDispatchMode):
    """Keeps the arguments of each metafast op that runs: its forward, backward and double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "metafast":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))
