"""One task's loss on a module's double, and what a step makes of its gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metafast.adaptation.dimensions import checked
from metafast.adaptation.examples import Examples, without
from metafast.adaptation.functions import Exact
from metafast.adaptation.inner_loop import InnerLoop
from metafast.adaptation.losses import LOSSES
from metafast.adaptation.scratch import Scratch
from metafast.adaptation.states import States, Tensors
from metafast.reference.labels import IGNORED


class Task:
    """What all tasks of a call of `adapt` do alike. Shapes are one task's."""

    def __init__(self, module: nn.Module, inner: InnerLoop, states: States) -> None:
        self.scratch = Scratch(module)
        self.inner = inner
        self._called = torch.compiler.is_compiling()
        named = {} if self._called else dict(module.named_parameters())
        self._strays = {id(named[name]): name for name in states.names if name in named}

    def call(self, params: Tensors, buffers: Tensors, x: Examples) -> tuple[Any, Tensors]:
        """The output of the module, and the buffers that it leaves."""
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm writes into them
        with Exact(self._strays), nullcontext() if self._called else checked(self.scratch.module, x):
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
        if weights is not None:
            counts = weights != 0
            x = without(x, counts)
            y = without(y, counts, IGNORED if inner.loss == "cross_entropy" else 0)
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

    def clipped(self, grads: Tensors) -> Tensors:
        """As `torch.nn.utils.clip_grad_norm_` leaves them."""
        if self.inner.max_norm is None:
            return grads
        square = sum(grad.square().sum() for grad in grads.values())
        norm = torch.where(square > 0, square, 1).sqrt() * (square > 0)  # 0 has no derivative as a root
        scale = (self.inner.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {name: grad * scale for name, grad in grads.items()}
