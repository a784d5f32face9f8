"""What a CUDA graph does, on the CPU: the operations of a step, repeated without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedOps:
    """Stands in for `CudaGraphs`. Every operation is repeated on the very tensors that it had, so a number
    that Python has passed stays as it was, and what Python does between the operations is not done.

    Attributes:
        recorded: how many steps were.
        replayed: how often one was taken again.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def warm_up(self, step: Callable[[], None]) -> None:
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with _Recorder() as recorder:
            step()
        taken = True  # unlike a CUDA graph's, by the recording

        def replay() -> None:
            nonlocal taken
            if not taken:
                self.replayed += 1
                recorder.repeat()
            taken = False

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[bool, Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((torch.is_grad_enabled(), func, args, kwargs or {}, _tensors(out)))
        return out

    def repeat(self) -> None:
        for grad, func, args, kwargs, results in self._calls:
            # A dispatch mode sees operations below autograd; some ask whether gradients will be wanted.
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad):
                inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
                for kept, now in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if kept.untyped_storage().data_ptr() not in inputs:  # else a view, or what was changed
                        kept.copy_(now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
