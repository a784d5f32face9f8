"""The meta-LSTM as a module: an LSTM whose cell state is a network's parameters, and its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metafast.ops.learned_optimizer import meta_lstm_state, meta_lstm_step, meta_lstm_step_, meta_lstm_unroll
from metafast.optim.cell import Cell

_INPUTS = 4  # log-sign of the gradient and of the loss


class MetaLSTM(Cell):
    """The meta-LSTM (Ravi and Larochelle 2017): its cell state is theta, the parameters that it trains.

    A step is theta = f theta - i grad, with a forget gate f and an input gate i of each coordinate (element
    of a parameter) that are learned; f = 1 and a constant i are gradient descent with learning rate i. The
    weights are shared by all coordinates, so it takes parameters of any number and shape.

    Equivalent to (H = ``hidden``), for the gradients of all P coordinates in one tensor g [P]::

        def log_sign(x):  # where |x| >= exp(-p), else [-1, exp(p) x]
            return torch.stack([x.abs().log() / p, x.sign()], -1)

        x = torch.cat([log_sign(g), log_sign(loss).expand(P, 2)], 1)
        for cell, l in zip(cells, range(layers)):  # nn.LSTMCell(4, H), nn.LSTMCell(H, H), ...
            h[l], c[l] = cell(x, (h[l], c[l]))
            x = h[l]
        i = input_gate(torch.stack([*x.T, theta, i], 1))[:, 0].sigmoid()  # nn.Linear(H + 2, 1)
        f = forget_gate(torch.stack([*x.T, theta, f], 1))[:, 0].sigmoid()  # another
        theta = f * theta - i * g

    A training loop of one's own is :class:`metafast.CoordinatewiseLSTM`'s, where it steps by ``theta, state =
    cell(theta, grads, value.detach(), state)``.

    Args:
        hidden: H, units of a layer.
        layers: LSTM layers below the gates, 0 to 3. One is the paper's model, whose gates remember gradients;
            with none they see the gradient, the loss, theta and their own values before (section 3.1).
        p: of the log-sign: gradients and losses below exp(-p) count as small.
        input_gate, forget_gate: where the gates begin, about, in (0, 1): at gradient descent with the one as
            learning rate, and what the other lacks to 1 as weight decay.

    Attributes:
        weight_ih_l0, weight_hh_l0, bias_l0, ...: [4H, 4] (of the next layers [4H, H]), [4H, H] and [4H] of
            each layer, gates in the order i f g o, as in `nn.LSTM`, but with one bias.
        weight_gates, bias_gates: [2, H + 2] (without layers [2, 4 + 2]) and [2]: the input and the forget
            gate, the last columns for theta and the gate's own value in the step before.

    Raises:
        ValueError: an argument is out of range.
    """

    _head = "weight_gates"

    def __init__(
        self,
        hidden: int = 20,
        layers: int = 1,
        *,
        p: float = 10.0,
        input_gate: float = 0.01,
        forget_gate: float = 0.993,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
            if not 0 < gate < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {gate}")
        super().__init__(
            hidden,
            layers,
            p,
            inputs=_INPUTS,
            head={"weight_gates": (2, (hidden if layers else _INPUTS) + 2), "bias_gates": (2,)},
            least_layers=0,
            device=device,
            dtype=dtype,
        )
        self.first_gates = (input_gate, forget_gate)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Layers uniform in ±1/sqrt(H), as `nn.LSTM`; gates in ±0.01, as in the paper."""
        for weight in self.weights[:-2]:
            nn.init.uniform_(weight, -(self.hidden**-0.5), self.hidden**-0.5)
        nn.init.uniform_(self.weight_gates, -0.01, 0.01)
        self.bias_gates.copy_(torch.tensor(self.first_gates, dtype=torch.float64).logit())

    def initial_state(self, theta: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for the coordinates of ``theta``, of any shapes: packed [B, 2LH + 2, 64].

        :func:`metafast.ops.learned_optimizer.state_views` shows the parts.

        Args:
            dtype: default: that of ``theta``; ``torch.bfloat16`` halves the memory.
        """
        return meta_lstm_state(theta, hidden=self.hidden, layers=self.layers, dtype=dtype)

    def forward(
        self, theta: Sequence[Tensor], grads: Sequence[Tensor], loss: Tensor, state: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """One step: the new theta and state.

        :func:`metafast.meta_lstm_step`, which has shapes, dtypes and errors.
        """
        return meta_lstm_step(theta, grads, loss, state, self.weights, p=self.p)

    def unroll(
        self, theta: Sequence[Tensor], grads: Sequence[Tensor], losses: Tensor, state: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """K steps along recorded gradients, each [K, ...], and losses [K]: theta_1 to theta_K, and the state.

        :func:`metafast.meta_lstm_unroll`.
        """
        return meta_lstm_unroll(theta, grads, losses, state, self.weights, p=self.p)

    @torch.no_grad()
    def step_(self, theta: Sequence[Tensor], grads: Sequence[Tensor], loss: Tensor, state: Tensor) -> None:
        """One step of ``theta`` and ``state`` in place, not recorded: :func:`metafast.meta_lstm_step_`."""
        meta_lstm_step_(theta, grads, loss, state, self.weights, p=self.p)

    def extra_repr(self) -> str:
        return f"{self.hidden}, layers={self.layers}, p={self.p}"
