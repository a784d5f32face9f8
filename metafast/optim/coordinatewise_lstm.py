"""The learned optimizer as a module: an LSTM that all coordinates share, and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.ops.learned_optimizer import (
    lstm_optimizer_state,
    lstm_optimizer_step,
    lstm_optimizer_step_,
    lstm_optimizer_unroll,
)
from metafast.optim.cell import Cell

_INPUTS = {"log_sign": 2, "none": 1}  # numbers that stand for a gradient


class CoordinatewiseLSTM(Cell):
    """Gradient descent as an LSTM (Andrychowicz et al. 2016): gradients in, steps of the parameters out.

    One small LSTM moves every coordinate (element of a parameter) by itself, with a state for each
    coordinate and the same weights for all; so it takes parameters of any number and shape.

    Equivalent to (H = ``hidden``), for the gradients of all P coordinates in one tensor g [P]::

        x = torch.stack([g.abs().log() / p, g.sign()], 1)  # where |g| >= exp(-p), else [-1, exp(p) g]
        for cell, i in zip(cells, range(layers)):  # nn.LSTMCell(2, H), nn.LSTMCell(H, H), ...
            h[i], c[i] = cell(x, (h[i], c[i]))
            x = h[i]
        step = scale * out(x)[:, 0]  # nn.Linear(H, 1)

    The state is an argument and a result: :meth:`initial_state` begins an optimisation, and ``detach()`` of
    the state and the parameters is where the meta-gradient ends. So truncated backpropagation, with the
    gradients that the LSTM sees taken as given (section 2.1 of the paper), is::

        state = cell.initial_state(params)
        for _ in range(parts):
            params, state = [p.detach().requires_grad_() for p in params], state.detach()
            value, total = loss(params), 0
            for _ in range(truncation):
                grads = torch.autograd.grad(value, params, retain_graph=True)
                params, state = cell(grads, state, params)
                value = loss(params)
                total = total + value
            meta_optimizer.zero_grad()
            total.backward()
            meta_optimizer.step()

    ``metafast train l2l`` does it with one :meth:`unroll` for all parts, which records no graph
    (:class:`metafast.methods.LearnedOptimizer`); :meth:`from_checkpoint` loads the cell of such a run.

    Args:
        hidden: H, units of a layer.
        layers: of the LSTM, 1 to 3.
        preprocess: ``"log_sign"`` (appendix A of the paper), for gradients of any size; ``"none"`` takes them
            as they are.
        p: of the preprocessing: gradients below exp(-p) count as small.
        scale: what the LSTM's output is multiplied by.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_l0, ...: [4H, 2] (with ``"none"`` [4H, 1]; of the next layers [4H,
            H]), [4H, H] and [4H] of each layer, gates in the order i f g o, as in `nn.LSTM` with one bias.
        weight_out, bias_out: [1, H] and [1].

    Raises:
        ValueError: an argument is out of range.
    """

    _kept = ("p", "scale")
    _head = "weight_out"

    def __init__(
        self,
        hidden: int = 20,
        layers: int = 2,
        *,
        preprocess: str = "log_sign",
        p: float = 10.0,
        scale: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if preprocess not in _INPUTS:
            raise ValueError(f"preprocess: expected one of {tuple(_INPUTS)}, got {preprocess!r}")
        super().__init__(
            hidden,
            layers,
            p,
            inputs=_INPUTS[preprocess],
            head={"weight_out": (1, hidden), "bias_out": (1,)},
            least_layers=1,
            device=device,
            dtype=dtype,
        )
        self.preprocess = preprocess
        self.scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H), as `nn.LSTM`; the output's bias 0, for it pushes all coordinates alike."""
        bound = self.hidden**-0.5
        for weight in self.weights:
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.bias_out)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of the functions of :mod:`metafast.ops.learned_optimizer`."""
        return {"preprocess": self.preprocess, "p": self.p, "scale": self.scale}

    def initial_state(self, params: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for the coordinates of ``params``, of any shapes: packed [B, 2LH, 64].

        :func:`metafast.ops.learned_optimizer.state_views` shows the parts.

        Args:
            dtype: default: that of ``params``; ``torch.bfloat16`` halves the memory.
        """
        return lstm_optimizer_state(params, hidden=self.hidden, layers=self.layers, dtype=dtype)

    def forward(
        self, grads: Sequence[Tensor], state: Tensor, params: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """One step: the updates, or with ``params`` the new parameters, and the new state.

        :func:`metafast.lstm_optimizer_step`, which has shapes, dtypes and errors.
        """
        return lstm_optimizer_step(grads, state, self.weights, params=params, **self.options)

    def unroll(
        self, grads: Sequence[Tensor], state: Tensor, params: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """K steps along recorded gradients, each [K, ...]: :func:`metafast.lstm_optimizer_unroll`."""
        return lstm_optimizer_unroll(grads, state, self.weights, params=params, **self.options)

    @torch.no_grad()
    def step_(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: Tensor) -> None:
        """One step of ``params`` and ``state`` in place, not recorded: ``metafast.lstm_optimizer_step_``."""
        lstm_optimizer_step_(params, grads, state, self.weights, **self.options)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden}, layers={self.layers}, preprocess={self.preprocess!r}, p={self.p}, "
            f"scale={self.scale}"
        )

    @classmethod
    def options_of(cls, state_dict: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = super().options_of(state_dict, prefix)
        first = state_dict.get(f"{prefix}weight_ih_l0")
        if found and first is not None:
            names = {inputs: name for name, inputs in _INPUTS.items()}
            found["preprocess"] = names.get(first.shape[-1], f"{first.shape[-1]} inputs")
        return found
