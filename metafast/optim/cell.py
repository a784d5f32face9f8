"""What the learned optimizers' cells share: an LSTM and its head as parameters of a module."""

from __future__ import annotations

import os
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from metafast.reference.learned_optimizer import MOST_P

_MOST_LAYERS = 3
_EXTRA = "_extra_state"  # where a state_dict has what get_extra_state gives

Self = TypeVar("Self", bound="Cell")


class Cell(nn.Module):
    """The weights of ``layers`` LSTM layers of ``hidden`` units on ``inputs`` numbers, and of a head.

    With other options the same weights are another optimizer. So a ``state_dict`` holds those of ``_kept``,
    which no weight's shape tells, and a cell refuses weights that belong to others.

    Args:
        head: name and shape of the head's weights.
        least_layers: the fewest layers that the cell can have.
    """

    _kept: ClassVar[tuple[str, ...]] = ("p",)
    _head: ClassVar[str]  # the head's weight, which no other cell has

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
        if not 0 < p <= MOST_P:
            raise ValueError(f"p: expected a number > 0, at most {MOST_P}, got {p}")
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

    @classmethod
    def from_checkpoint(
        cls: type[Self], path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Self:
        """The cell that a run of ``metafast train`` has trained, with its options and its weights.

        Needs ``metafast[cli]``.

        Args:
            path: the folder of the run, for its latest checkpoint, or a checkpoint in it.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the run has trained something else.
        """
        from metafast.runs.checkpoint import Checkpoint  # needs safetensors

        found, checkpoint = Checkpoint.latest(path)
        weights = checkpoint.model("cell")
        options = cls.options_of(weights)
        if not options:
            raise ValueError(f"path: expected a run that trains a {cls.__name__}, got another in {found}")
        cell = cls(**options, dtype=next(iter(weights.values())).dtype)
        cell.load_state_dict(weights)
        return cell.to(device).eval()

    @property
    def weights(self) -> list[Tensor]:
        """[W_ih, W_hh, b, ..., W, b], as the functions of :mod:`metafast.ops.learned_optimizer` take them."""
        return [getattr(self, name) for name in self._names]

    @classmethod
    def options_of(cls, state_dict: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """The arguments of a cell that has these weights, as far as they tell; none if it is another cell."""
        if f"{prefix}{cls._head}" not in state_dict:
            return {}
        layers = [f"{prefix}weight_hh_l{layer}" for layer in range(_MOST_LAYERS)]
        found = {"layers": sum(name in state_dict for name in layers)}
        if layers[0] in state_dict:
            found["hidden"] = state_dict[layers[0]].shape[-1]
        if f"{prefix}{_EXTRA}" in state_dict:
            found |= zip(cls._kept, state_dict[f"{prefix}{_EXTRA}"].tolist(), strict=True)
        return found

    def get_extra_state(self) -> Tensor:
        """The options of ``_kept``, float64, which travel with the weights."""
        numbers = [getattr(self, name) for name in self._kept]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: they are this cell's, or its weights would not have been loaded."""

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
        # A cell of another size differs in every weight, one with other options in none: one line says why.
        wrong = [
            f"{name}: expected the weights of a cell with {getattr(self, name)!r}, got {value!r}"
            for name, value in self.options_of(state_dict, prefix).items()
            if value != getattr(self, name)
        ]
        if wrong:
            error_msgs.append("; ".join(wrong))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
