"""A trained learned optimizer in the place of `torch.optim.Adam`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metafast.ops.learned_optimizer import lstm_optimizer_step_
from metafast.optim.coordinatewise_lstm import CoordinatewiseLSTM

_DTYPES = (torch.float32, torch.float64)
_STATE, _SHAPE = "lstm", "shape"
_OPTIONS = {"lr", "state_dtype"}  # of a group


class LSTMOptimizer(Optimizer):
    """Trains any network with a trained :class:`metafast.CoordinatewiseLSTM` (Andrychowicz et al. 2016).

    Used like `torch.optim.Adam`, with parameter groups, learning rate schedulers, closures and
    ``state_dict``. All parameters of a group take their step in one launch, in place. Parameters without a
    gradient, and their states, are left alone. ``cell`` is no part of the state: the optimizer reads its
    weights in every step and never changes them.

    It is an optimizer for about as many steps as its cell was trained for (``metafast train l2l
    --inner-steps``, 100 by default); beyond them it tires, where Adam goes on.

    Equivalent to, for the parameters of a group that have a gradient::

        updates, state = cell([p.grad for p in params], state)
        for p, update in zip(params, updates):
            p += lr * update

    Args:
        params: parameters, (name, parameter) pairs, or groups of them, as for every optimizer of torch;
            float32 or float64, dense.
        cell: what proposes the steps; on the parameters' device. ``CoordinatewiseLSTM.from_checkpoint`` has
            that of a run of ``metafast train l2l``.
        lr: what its steps are multiplied by: 1 is as it was trained; a number, or a tensor of one element. Of
            each group.
        state_dtype: of the state, 8H bytes a coordinate and layer in float32; ``torch.bfloat16`` halves it,
            with arithmetic as before, beside float32 parameters. Default: that of each parameter. Of each
            group.
        capturable: may :meth:`step` be captured in a CUDA graph? As for `torch.optim.Adam`: the first step,
            which makes the states, comes before the capture; a replay goes on from the states as they are and
            with the cell's weights as they are. It has ``lr`` as it was captured, but as it is where that is
            a tensor on the parameters' device. Of each group.

    Attributes:
        state: ``state[p]["lstm"]`` is parameter p's state, [ceil(numel / 64), 2LH, 64], from its first
            gradient on, and ``state[p]["shape"]`` the shape that p has; :func:`metafast.state_views` shows h
            and c.

    Raises:
        TypeError: a parameter or ``state_dtype`` of another dtype; a sparse gradient.
        RuntimeError: a step is captured that may not be, or before the first one.
        ValueError: ``lr`` is negative; :meth:`load_state_dict` gets what another optimizer saved, or a state
            that does not fit its parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        cell: CoordinatewiseLSTM,
        *,
        lr: float | Tensor = 1.0,
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
    ) -> None:
        if not isinstance(cell, CoordinatewiseLSTM):
            raise TypeError(f"cell: expected a CoordinatewiseLSTM, got {type(cell).__name__}")
        self.cell = cell
        self._packs: list[tuple[list[Tensor], Tensor]] = []
        super().__init__(params, {"lr": lr, "state_dtype": state_dtype, "capturable": capturable})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "cell": self.cell}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._packs = []
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)  # of before there was one

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; the new group may have ``lr`` of its own."""
        lr = param_group.get("lr", self.defaults["lr"])
        if not lr >= 0:
            raise ValueError(f"lr: expected a number >= 0, got {lr}")
        super().add_param_group(param_group)
        try:
            _check_dtypes(self.param_groups[-1], self.param_groups[-1]["state_dtype"])
        except TypeError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the loss anew, with its gradients, and returns it.

        Returns:
            What ``closure`` returned.
        """
        if _is_capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "step: a CUDA graph captures it, which takes LSTMOptimizer(..., capturable=True)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise TypeError(
                        f"grad: expected a dense gradient, got {param.grad.layout} ({_name(group, index)})"
                    )
            for params in _alike([param for param in group["params"] if param.grad is not None]):
                weights = [weight.to(params[0].dtype) for weight in self.cell.weights]
                lr, options = group["lr"], self.cell.options
                if group["capturable"] and isinstance(lr, Tensor):  # read where it is: the step is linear in
                    weights[-2:] = [weight * lr for weight in weights[-2:]]  # the last layer's weights
                else:
                    options["scale"] *= float(lr)
                lstm_optimizer_step_(
                    params,
                    [param.grad for param in params],
                    self._pack(params, group["state_dtype"]),
                    weights,
                    **options,
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`; states keep their dtype.

        Raises:
            ValueError: another optimizer saved it, or a state does not fit its parameter, which the message
                names. Nothing is changed.
            TypeError: its ``state_dtype`` does not go with the parameters. Nothing is changed.
        """
        self._check_fit(state_dict)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                if _STATE in self.state.get(param, {}):  # torch has cast it to the parameter's dtype
                    dtype = group["state_dtype"] or param.dtype
                    self.state[param][_STATE] = self.state[param][_STATE].to(dtype)

    def _check_fit(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if not saved.keys() >= _OPTIONS:
                raise ValueError(
                    f"state_dict: expected an LSTMOptimizer's, with {', '.join(sorted(_OPTIONS))} in a "
                    f"group, got one with {', '.join(name for name in saved if name != 'params')}"
                )
            _check_dtypes(group, saved["state_dtype"])
            for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                state = state_dict["state"].get(key)
                if state:
                    self._check_state(state, param, _name(group, index))

    def _check_state(self, state: dict[str, Any], param: Tensor, name: str) -> None:
        if not {_STATE, _SHAPE} <= state.keys():
            raise ValueError(f"state of {name}: expected {_STATE} and {_SHAPE}, got {', '.join(state)}")
        expected = tuple(self.cell.initial_state([param.detach().to("meta")]).shape)
        got = tuple(state[_STATE].shape)
        if tuple(state[_SHAPE]) != param.shape or got != expected:
            raise ValueError(
                f"state of {name}: expected {expected}, for shape {tuple(param.shape)} and a cell of "
                f"{self.cell.layers} layers of {self.cell.hidden} units, got {got}, for shape "
                f"{tuple(state[_SHAPE])}"
            )

    def _pack(self, params: list[Tensor], dtype: torch.dtype | None) -> Tensor:
        """The states of ``params`` as one tensor, of which each is a part; new ones are 0.

        They lie together already where the same parameters had gradients in the step before.
        """
        states = [self.state[param].get(_STATE) for param in params]
        for parts, packed in self._packs:
            if len(parts) == len(states) and all(map(operator.is_, parts, states)):
                return packed
        if _is_capturing():
            raise RuntimeError(
                "step: expected one before the capture, with gradients of the same parameters, which makes "
                "their states: a graph that makes them begins anew at every replay"
            )
        new = [
            self.cell.initial_state([param], dtype) if state is None else state
            for param, state in zip(params, states, strict=True)
        ]
        packed = torch.cat(new)
        parts = list(packed.split([len(state) for state in new]))
        for param, part in zip(params, parts, strict=True):
            self.state[param] |= {_STATE: part, _SHAPE: tuple(param.shape)}
        owners = {id(state[_STATE]): state for state in self.state.values() if _STATE in state}
        kept = []
        for pack in self._packs:
            left = [part for part in pack[0] if id(part) in owners]
            if len(left) == len(pack[0]):
                kept.append(pack)
                continue
            for part in left:  # which would keep the memory of the whole pack
                owners[id(part)][_STATE] = part.clone()
        self._packs = [*kept, (parts, packed)]
        return packed


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters of each device and dtype."""
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        parts.setdefault((param.device, param.dtype), []).append(param)
    return list(parts.values())


def _check_dtypes(group: dict[str, Any], state_dtype: torch.dtype | None) -> None:
    """May states of this dtype, of their parameter's with None, go with the parameters of a group?"""
    for index, param in enumerate(group["params"]):
        if param.dtype not in _DTYPES:
            raise TypeError(f"params: expected float32 or float64, got {param.dtype} ({_name(group, index)})")
        allowed = [param.dtype, *([torch.bfloat16] if param.dtype == torch.float32 else [])]
        if state_dtype not in (None, *allowed):
            raise TypeError(
                f"state_dtype: expected {' or '.join(map(str, allowed))} beside {param.dtype}, got "
                f"{state_dtype} ({_name(group, index)})"
            )


def _name(group: dict[str, Any], index: int) -> str:
    """A parameter of a group, for people."""
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index} of its group"
