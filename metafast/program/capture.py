"""A step of training as a CUDA graph: recorded once, then replayed by one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

Batch = TypeVar("Batch")

WARM_UP = 3  # steps before the recording, in which libraries set themselves up: as many as torch advises


class NotCapturable(Exception):
    """Why a step cannot be recorded."""


class Graphs(Protocol):
    """What records steps."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Takes a step where it will be recorded."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What takes the step again and again; recording it does not."""


class CudaGraphs:
    """CUDA graphs, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                step()
        except RuntimeError as error:  # CUDA is then in no state to go on in
            raise RuntimeError(f"graph: the step cannot be recorded, which takes off: {error}") from error
        return graph.replay


class CapturedStep(Generic[Batch]):
    """A step of training, which a call takes for a batch, and waits for nothing.

    A batch is copied into tensors that stay where they are. The first calls take the step as it is written,
    the next records it, and from there on a call is a replay. So the step may change tensors, and draw from
    torch's default generators, but change no state in Python.

    Args:
        gradient: leaves the gradients of a batch, and gives its loss and their norms, [1 + P].
        update: moves the weights by them.
        device: where all this is.
        graphs: what records it.
    """

    def __init__(
        self,
        gradient: Callable[[Batch], Tensor],
        update: Callable[[], None],
        device: torch.device,
        graphs: Graphs,
    ) -> None:
        self._gradient = gradient
        self._update = update
        self._device = device
        self._graphs = graphs
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._batch: Batch | None = None
        self._figures = self._total = torch.zeros(0)

    def __call__(self, batch: Batch) -> Batch:
        """Takes the step; gives the batch where it lies now, until the next call.

        Raises:
            NotCapturable: the step waits for the device, or the batch is of another shape than the first.
                What the step changes may have changed by then.
        """
        if self._batch is None:
            self._batch = _mapped(torch.clone, batch)
        else:
            torch._foreach_copy_(*zip(*_pairs(self._batch, batch, "batch"), strict=True))
        if self._calls == WARM_UP:
            self._replay = self._graphs.record(self._take)
        self._calls += 1
        if self._replay is not None:
            self._replay()
            return self._batch
        with _Watch(self._device) if self._calls == 1 else nullcontext():
            self._graphs.warm_up(self._take)
        return self._batch

    def read(self) -> tuple[float, bool]:
        """The loss of the last step; were all losses and gradients finite since this was asked last?"""
        loss, *totals = torch.cat([self._figures[:1], self._total]).tolist()  # waits for the device
        self._total.zero_()
        return loss, all(map(math.isfinite, totals))

    def _take(self) -> None:
        self._figures = self._gradient(self._batch)  # a replay writes them where the recording found them
        if self._calls == 1:
            self._total = torch.zeros_like(self._figures)
        self._total.add_(self._figures)  # what is not finite stays in it
        self._update()


class Rates:
    """The learning rates of an optimizer as tensors, whose values a recorded step takes at each replay.

    They are what torch's fused optimizers read, on CUDA a float32. The groups keep their numbers, which
    schedules set and checkpoints hold.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._tensors = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]

    def set(self) -> None:
        """Takes them over from the groups, for the next step."""
        for group, tensor in zip(self._optimizer.param_groups, self._tensors, strict=True):
            tensor.fill_(group["lr"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The optimizer goes by them, and may be captured, which of the fused ones Adam wants to be told."""
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for group, tensor in zip(groups, self._tensors, strict=True):
            group["lr"] = tensor
            if group.get("fused") and "capturable" in group:
                group["capturable"] = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        try:
            yield
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update(own)


class _Watch(TorchDispatchMode):
    """Raises :class:`NotCapturable` where an operation makes the host wait for a device, or copies to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        if func in _WAITING or name in _WAITING:
            raise NotCapturable(f"it waits for the device (torch's {name})")
        if name in _INDEXING and any(_is_mask(index) for index in args[1]):
            raise NotCapturable(f"it indexes with a mask, and waits for its size (torch's {name})")
        if name == "lift_fresh" and args[0].device == self._device:
            raise NotCapturable("it makes a tensor of numbers in Python, which are copied to the device")
        out = func(*args, **(kwargs or {}))
        if name in _COPYING and args[_COPYING[name]].device.type != out.device.type:
            raise NotCapturable(f"it copies from {args[_COPYING[name]].device} to {out.device}")
        return out


# torch's operations whose result, or its size, the host waits for; those that do where they get a mask; and
# those that copy, with the place of what they copy.
_WAITING = frozenset(
    (
        torch.ops.aten.repeat_interleave.Tensor,
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    )
)
_INDEXING = frozenset(("_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"))
_COPYING = {"_to_copy": 0, "copy_": 1}


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed: a dataclass, a list, a tuple, or something else."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, item) for item in value)
    if _is_record(value):
        return replace(value, **{name: _mapped(change, item) for name, item in _items(value)})
    return value


def _pairs(kept: Any, value: Any, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors in ``kept``, and those in the same places of a value that is like it."""
    if isinstance(kept, Tensor):
        if not isinstance(value, Tensor) or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            raise NotCapturable(f"{name} was {_said(kept)} at first, and now is {_said(value)}")
        yield kept, value
    elif isinstance(kept, (list, tuple)) and isinstance(value, type(kept)) and len(kept) == len(value):
        for index, (one, other) in enumerate(zip(kept, value, strict=True)):
            yield from _pairs(one, other, f"{name}[{index}]")
    elif _is_record(kept) and type(kept) is type(value):
        for (field, one), (_, other) in zip(_items(kept), _items(value), strict=True):
            yield from _pairs(one, other, f"{name}.{field}")
    elif kept is not value and kept != value:
        raise NotCapturable(f"{name} was {_said(kept)} at first, and now is {_said(value)}")


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _items(record: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(record, field.name)) for field in fields(record)]


def _said(value: Any) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
