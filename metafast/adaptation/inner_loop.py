"""What an inner loop does besides on what: its options and its learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast._dispatch.arguments import check_count, check_not_negative, is_number, kind_of
from metafast.adaptation.examples import Examples
from metafast.adaptation.losses import LOSSES
from metafast.adaptation.states import Tensors
from metafast.ops.inner_loop import sgd_update

Loss = str | Callable[[Examples, Examples], Tensor]
Penalty = Callable[[Tensors, Tensors], Tensor]
Rate = float | Tensor | list[Tensor]  # of a step, as `sgd_update` takes it
Momenta = list[Tensor] | None
Rates = float | Tensor | Sequence[float | Tensor] | Mapping[str, float | Tensor]


@dataclass(eq=False)
class InnerLoop:
    """The options of `adapt`, under their names."""

    loss: Loss = "cross_entropy"
    steps: int = 1
    first_order: bool = False
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    per_step: bool = False
    max_norm: float | Tensor | None = None
    penalty: Penalty | None = None
    weighted: bool = False  # whether there are example weights
    checkpoint_steps: bool = False
    layered: bool = False  # whether there is a learning rate of each step and layer

    def check(self) -> None:
        check_count(steps=self.steps)
        check_not_negative(momentum=self.momentum, weight_decay=self.weight_decay, max_norm=self.max_norm)
        if not callable(self.loss) and self.loss not in tuple(LOSSES):
            raise ValueError(f"loss: expected 'mse', 'cross_entropy' or a function, got {self.loss!r}")
        if self.weighted and callable(self.loss):
            raise ValueError(
                "example_weights: expected loss 'mse' or 'cross_entropy'; a function of your own can take "
                "the weights as a part of y"
            )
        if self.penalty is not None and not callable(self.penalty):
            raise TypeError(f"penalty: expected a function, got {kind_of(self.penalty)}")

    def beyond_kernels(self) -> str | None:
        """What of it the fused kernels do not have."""
        options = ("weight_decay", "nesterov", "max_norm", "penalty")
        for name in options:
            if getattr(self, name) not in (0, False, None):
                return f"the kernels have no {name}"
        if self.per_step and self.momentum:
            return "the kernels have no batches of each step together with momentum"
        return None if isinstance(self.loss, str) else "the loss is a function of the caller"

    def moved(
        self,
        params: Tensors,
        grads: Tensors,
        rates: Rate,
        momenta: Momenta,
    ) -> tuple[Tensors, list[Tensor]]:
        """The parameters one step on, and the momentum buffers."""
        updated, momenta = sgd_update(
            list(params.values()),
            [grads[name] for name in params],
            rates,
            momentum_buffers=momenta or None,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        return dict(zip(params, updated, strict=True)), momenta


class LearningRates:
    """lr for each step, as `sgd_update` takes it."""

    def __init__(self, lr: Rates, params: Tensors, steps: int) -> None:
        """
        Args:
            lr: As `adapt` takes it.
            params: Those that adapt, of one task.
        """
        check_not_negative(lr=lr)
        self.of_layers = None  # [K, L]
        self.fixed = lr
        self.names = list(params)
        if isinstance(lr, Tensor) and lr.dim():
            layers = layers_of(params)
            if lr.shape != (steps, len(layers)):
                raise ValueError(
                    f"lr: expected a number, a tensor [], one for each parameter, or a tensor [K, L] = "
                    f"[{steps}, {len(layers)}] of each step and layer that adapts, got shape {list(lr.shape)}"
                )
            self.of_layers = lr
            self.layer_of = [layers.index(_layer(name)) for name in params]
        elif not isinstance(lr, Tensor) and not is_number(lr):
            self.fixed = _for_each(lr, params)

    def at(self, step: int) -> Rate:
        if self.of_layers is None:
            return self.fixed
        return [self.of_layers[step, layer] for layer in self.layer_of]

    def for_kernels(
        self, params: Tensors, blocks: Sequence[int]
    ) -> float | Tensor | list[Tensor] | list[list[Tensor]]:
        """As the kernels take it; or, where these have no such rates for more steps than one, of each step.

        Args:
            params: Those of one task, in the order of the kernels.
            blocks: The numbers of the kernels' layers that these are in, which have a rate for each step.
        """
        if self.of_layers is None:
            return self._expanded(self.fixed, params) if isinstance(self.fixed, list) else self.fixed
        owners = [self.layer_of[self.names.index(name)] for name in params]
        of_blocks = dict(zip(blocks, owners, strict=True))
        if len(self.of_layers) and any(of_blocks[b] != o for b, o in zip(blocks, owners, strict=True)):
            return [self._expanded(self.at(step), params) for step in range(len(self.of_layers))]
        chosen = list(of_blocks.values())
        return self.of_layers if chosen == list(range(len(chosen))) else self.of_layers[:, chosen]

    def _expanded(self, rates: list[Tensor], params: Tensors) -> list[Tensor]:
        return [rates[self.names.index(name)].expand(p.shape) for name, p in params.items()]


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers that the parameters of these names are in, in their order."""
    return list(dict.fromkeys(map(_layer, names)))


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _for_each(lr: Rates, params: Tensors) -> list[Tensor]:
    names = ", ".join(params)
    if hasattr(lr, "items"):  # a dict, or a ParameterDict
        given = dict(lr.items())
        if set(given) != set(params):
            raise ValueError(
                f"lr: expected one for each of {names}; check {', '.join(sorted(set(given) ^ set(params)))}"
            )
        values = [given[name] for name in params]
    elif isinstance(lr, str) or not isinstance(lr, Iterable):
        raise TypeError(f"lr: expected a number, a tensor, a sequence or a dict of them, got {kind_of(lr)}")
    else:
        values = list(lr)
        if len(values) != len(params):
            raise ValueError(f"lr: expected one for each of {names}, got {len(values)}")
    return [_rate(value, *named) for value, named in zip(values, params.items(), strict=True)]


def _rate(value: float | Tensor, name: str, param: Tensor) -> Tensor:
    """A tensor that broadcasts to the parameter."""
    if not isinstance(value, Tensor):
        check_not_negative(lr=value)
        value = torch.full((), value, dtype=param.dtype, device=param.device)
    try:
        value.expand(param.shape)
    except RuntimeError:
        shapes = f"{list(param.shape)}, got {list(value.shape)}"
        raise ValueError(f"lr: expected for {name} what broadcasts to its shape, {shapes}") from None
    return value
