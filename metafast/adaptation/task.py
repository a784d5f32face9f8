"""One task's loss on a module's double, and what a step makes of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metafast.adaptation.checkpoints import NotCheckpointedError, checkpointed
from metafast.adaptation.dimensions import checked
from metafast.adaptation.examples import Examples
from metafast.adaptation.functions import Exact
from metafast.adaptation.inner_loop import InnerLoop
from metafast.adaptation.losses import LOSSES
from metafast.adaptation.scratch import Scratch
from metafast.adaptation.states import States, Tensors

Result = TypeVar("Result")


class Task:
    """What all tasks of a call of `adapt` do alike. Shapes are one task's.

    With ``by_first`` (n, of m), batch norm of m examples goes by the statistics of the first n.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: InnerLoop,
        states: States,
        by_first: tuple[int, int] | None = None,
    ) -> None:
        self.scratch = Scratch(module)
        self.inner = inner
        self._by_first = by_first
        self._shared: Tensors = {}  # parameters that do not adapt, and have a gradient
        if inner.checkpoint_steps:
            adapting = set(states.names)
            self._shared = {
                name: param
                for name, param in module.named_parameters()
                if param.requires_grad and name not in adapting
            }
        self._called = torch.compiler.is_compiling()
        named = {} if self._called else dict(module.named_parameters())
        self._strays = {id(named[name]): name for name in states.names if name in named}

    def call(self, params: Tensors, buffers: Tensors, x: Examples) -> tuple[Any, Tensors]:
        """The output of the module, and the buffers that it leaves."""
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm writes into them
        with (
            Exact(self._strays, self._by_first),
            nullcontext() if self._called else checked(self.scratch.module, x),
        ):
            out = self.scratch.call({**params, **buffers}, x)
        self._called = True
        return out, self.scratch.buffers(buffers)

    def loss(
        self,
        params: Tensors,
        buffers: Tensors,
        start: Tensors,
        x: Examples,
        y: Examples,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensors]:
        """The loss, with the penalty; and the buffers. `start` is what the parameters were at first."""
        inner = self.inner
        out, buffers = self.call(params, buffers, x)
        value = LOSSES[inner.loss](out, y, weights) if isinstance(inner.loss, str) else inner.loss(out, y)
        if not isinstance(value, Tensor) or value.dim():
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss: expected a function that returns a scalar, got {got}")
        if inner.penalty is not None:
            value = value + inner.penalty(params, start)
            if value.dim():
                raise ValueError(
                    f"penalty: expected a function that returns a scalar, got {list(value.shape)}"
                )
        return value, buffers

    def step(self, moved: Callable[..., Result], *given: Any) -> Result:
        """``moved(*given)``, checkpointed if the inner loop says so."""
        if not self.inner.checkpoint_steps or self.inner.first_order or not torch.is_grad_enabled():
            return moved(*given)  # no graph of a step is kept
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            raise NotCheckpointedError(
                "checkpoint_steps: expected False in torch.compile and in transforms of torch.func, got True"
            )

        def with_shared(shared: Tensors, *given: Any) -> Result:
            self.scratch.place(shared)
            return moved(*given)

        return checkpointed(with_shared, self._shared, *given)

    def clipped(self, grads: Tensors) -> Tensors:
        """As `torch.nn.utils.clip_grad_norm_` leaves them."""
        if self.inner.max_norm is None:
            return grads
        square = sum(grad.square().sum() for grad in grads.values())
        norm = torch.where(square > 0, square, 1).sqrt() * (square > 0)  # 0 has no derivative as a root
        scale = (self.inner.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {name: grad * scale for name, grad in grads.items()}
