"""The learned optimizer as a module: an LSTM that all coordinates share, and its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.learned_optimizer import (
    lstm_optimizer_state,
    lstm_optimizer_step,
    lstm_optimizer_step_,
    lstm_optimizer_unroll,
)

_INPUTS = {"log_sign": 2, "none": 1}  # numbers that stand for a gradient
_LAYERS = (1, 2, 3)


class CoordinatewiseLSTM(nn.Module):
    """Gradient descent as an LSTM (Andrychowicz et al. 2016): gradients in, steps of the parameters out.

    One small LSTM moves every coordinate (element of a parameter) by itself, with a state for each
    coordinate and the same weights for all; so it takes parameters of any number and shape.

    Equivalent to (H = ``hidden``), for the gradients of all P coordinates in one tensor g [P]::

        x = torch.stack([g.abs().log() / p, g.sign()], 1)  # where |g| >= exp(-p), else [-1, exp(p) g]
        for cell, i in zip(cells, range(layers)):  # nn.LSTMCell(2, H), nn.LSTMCell(H, H), ...
            h[i], c[i] = cell(x, (h[i], c[i]))
            x = h[i]
        step = scale * out(x)[:, 0]  # nn.Linear(H, 1)

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
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if layers not in _LAYERS:
            raise ValueError(f"layers: expected one of {_LAYERS}, got {layers}")
        if preprocess not in _INPUTS:
            raise ValueError(f"preprocess: expected one of {tuple(_INPUTS)}, got {preprocess!r}")
        if not 0 < p < math.inf:
            raise ValueError(f"p: expected a number > 0, got {p}")
        self.hidden = hidden
        self.layers = layers
        self.preprocess = preprocess
        self.p = p
        self.scale = scale
        inputs = _INPUTS[preprocess]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(layers):
            shapes[f"weight_ih_l{layer}"] = (4 * hidden, hidden if layer else inputs)
            shapes[f"weight_hh_l{layer}"] = (4 * hidden, hidden)
            shapes[f"bias_l{layer}"] = (4 * hidden,)
        shapes |= {"weight_out": (1, hidden), "bias_out": (1,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._names = tuple(shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H), as `nn.LSTM`; the output's bias 0, for it pushes all coordinates alike."""
        bound = self.hidden**-0.5
        for weight in self.weights:
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.bias_out)

    @property
    def weights(self) -> list[Tensor]:
        """[W_ih, W_hh, b, ..., W_out, b_out], as the functions of :mod:`metafast.learned_optimizer` take."""
        return [getattr(self, name) for name in self._names]

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of those functions."""
        return {"preprocess": self.preprocess, "p": self.p, "scale": self.scale}

    def initial_state(self, params: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for the coordinates of ``params``, of any shapes: packed [B, 2LH, 64].

        :func:`metafast.learned_optimizer.state_views` shows the parts.

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

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A cell of another size differs in every weight: one line says why.
        if message := self._misfit(state_dict, prefix):
            error_msgs.append(message)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _misfit(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why the weights are those of another kind of cell; ``None`` where they are not, or absent."""
        first = [state_dict.get(f"{prefix}weight_{kind}_l0") for kind in ("ih", "hh")]
        if any(weight is None or weight.dim() != 2 for weight in first):
            return None
        names = {2: "log_sign", 1: "none"}
        found = {
            "hidden": first[1].shape[1],
            "layers": sum(f"{prefix}weight_hh_l{layer}" in state_dict for layer in range(max(_LAYERS))),
            "preprocess": names.get(first[0].shape[1], f"{first[0].shape[1]} inputs"),
        }
        wrong = [
            f"{name}: expected the weights of a cell with {getattr(self, name)!r}, got {value!r}"
            for name, value in found.items()
            if value != getattr(self, name)
        ]
        return "; ".join(wrong) or None
