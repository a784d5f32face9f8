"""What the learned optimizers' cells share: an LSTM and its head as parameters of a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_MOST_LAYERS = 3


class Cell(nn.Module):
    """The weights of ``layers`` LSTM layers of ``hidden`` units on ``inputs`` numbers, and of a head.

    Args:
        head: name and shape of the head's weights.
        least_layers: the fewest layers that the cell can have.
    """

    def __init__(
        self,
        hidden: int,
        layers: int,
        p: float,
        *,
        inputs: int,
        head: dict[str, tuple[int, ...]],
        least_layers: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if not least_layers <= layers <= _MOST_LAYERS:
            raise ValueError(f"layers: expected {least_layers} to {_MOST_LAYERS}, got {layers}")
        if not 0 < p < math.inf:
            raise ValueError(f"p: expected a number > 0, got {p}")
        self.hidden = hidden
        self.layers = layers
        self.p = p
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(layers):
            shapes[f"weight_ih_l{layer}"] = (4 * hidden, hidden if layer else inputs)
            shapes[f"weight_hh_l{layer}"] = (4 * hidden, hidden)
            shapes[f"bias_l{layer}"] = (4 * hidden,)
        shapes |= head
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._names = tuple(shapes)

    @property
    def weights(self) -> list[Tensor]:
        """[W_ih, W_hh, b, ..., W, b], as the functions of :mod:`metafast.learned_optimizer` take them."""
        return [getattr(self, name) for name in self._names]

    def kind_of(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """The attributes of a cell that has these weights, as far as they tell."""
        if f"{prefix}{self._names[-2]}" not in state_dict:  # the head, which every such cell has
            return {}
        layers = [f"{prefix}weight_hh_l{layer}" for layer in range(_MOST_LAYERS)]
        found = {"layers": sum(name in state_dict for name in layers)}
        if layers[0] in state_dict and self.layers:
            found["hidden"] = state_dict[layers[0]].shape[-1]
        return found

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
        wrong = [
            f"{name}: expected the weights of a cell with {getattr(self, name)!r}, got {value!r}"
            for name, value in self.kind_of(state_dict, prefix).items()
            if value != getattr(self, name)
        ]
        if wrong:
            error_msgs.append("; ".join(wrong))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
