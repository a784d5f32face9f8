"""What the learned optimizers are measured on, and the arithmetic that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import metafast
from bench.common.cuda_graph import graphed
from metafast.reference import learned_optimizer as reference

P_LOG_SIGN = 10.0
SCALE = 0.1
BFLOAT16 = "bfloat16 state"

Read = Callable[[], Sequence[Tensor]]
Call = Callable[[], Read]  # returns what reads its results: no call pays for another layout than its own


@dataclass(frozen=True)
class Problem:
    """P coordinates of one tensor, recorded gradients of K steps, and the LSTM.

    The weights are [W_ih_1 [4H, I], W_hh_1 [4H, H], b_1 [4H], ..., and the head's]. LSTM optimizer: I = 2,
    head [1, H] and [1]. Meta-LSTM: I = 4, head [2, H + 2] and [2].
    """

    weights: Sequence[Tensor]
    params: Tensor  # [P]
    grads: Tensor  # [K, P]
    losses: Tensor | None  # [K], of the meta-LSTM alone
    hidden: Tensor  # [L, P, H]
    cell: Tensor  # [L, P, H]
    gates: Tensor  # [P, 2], of the meta-LSTM; else [P, 0]
    grad_out: Tensor  # [K, P], the recorded dL/dtheta_k

    @property
    def layers(self) -> int:
        return self.hidden.shape[0]

    @property
    def units(self) -> int:
        return self.hidden.shape[2]

    @property
    def is_meta(self) -> bool:
        return self.losses is not None

    def leaves(self) -> list[Tensor]:
        return [w.detach().clone().requires_grad_() for w in self.weights]

    def state(self, dtype: torch.dtype) -> Tensor:
        """As metafast packs it: [B, R, 64]."""
        size, block = self.params.numel(), reference.BLOCK
        blocks = reference.blocks(size)
        rows = 2 * self.layers * self.units + self.gates.shape[1]
        state = torch.zeros(blocks, rows, block, dtype=dtype, device=self.params.device)
        views = self._views(state)
        for view, values in zip(views, (self.hidden, self.cell, self.gates), strict=True):
            view.copy_(F.pad(values, (0, 0, 0, blocks * block - size)).unflatten(-2, (blocks, block)))
        return state

    def read_state(self, state: Tensor) -> list[Tensor]:
        """hidden, cell and, of the meta-LSTM, gates, as above."""
        rows = [view.flatten(-3, -2)[..., : self.params.numel(), :] for view in self._views(state)]
        return rows if self.is_meta else rows[:2]

    def _views(self, state: Tensor) -> reference.StateViews:
        return reference.state_views(state, hidden=self.units, layers=self.layers)

    def double_part(self, start: int, end: int) -> Problem:
        """Some coordinates, in float64."""

        def cut(tensor: Tensor, dim: int) -> Tensor:
            return tensor.narrow(dim, start, end - start).double()

        return Problem(
            [w.double() for w in self.weights],
            cut(self.params, 0),
            cut(self.grads, 1),
            None if self.losses is None else self.losses.double(),
            cut(self.hidden, 1),
            cut(self.cell, 1),
            cut(self.gates, 0),
            cut(self.grad_out, 1),
        )


# --- metafast ---------------------------------------------------------------------------------------------


def metafast_step_in_place(
    problem: Problem, state_dtype: torch.dtype = torch.float32, in_a_graph: bool = False
) -> Call:
    """As an optimizer uses it: parameters and state change in place."""
    theta, state, grad = problem.params.clone(), problem.state(state_dtype), problem.grads[0]

    def read() -> Sequence[Tensor]:
        return theta, *problem.read_state(state)

    def call() -> Read:
        if problem.is_meta:
            metafast.meta_lstm_step_([theta], [grad], problem.losses[0], state, problem.weights, p=P_LOG_SIGN)
        else:
            metafast.lstm_optimizer_step_([theta], [grad], state, problem.weights, p=P_LOG_SIGN, scale=SCALE)
        return read

    return graphed(call, changes=(theta, state)) if in_a_graph else call


def metafast_step(problem: Problem) -> Call:
    """The differentiable function, without a gradient wanted."""
    theta, state, grad = problem.params, problem.state(torch.float32), problem.grads[0]

    def call() -> Read:
        nonlocal theta, state
        if problem.is_meta:
            (theta,), state = metafast.meta_lstm_step(
                [theta], [grad], problem.losses[0], state, problem.weights, p=P_LOG_SIGN
            )
        else:
            (theta,), state = metafast.lstm_optimizer_step(
                [grad], state, problem.weights, params=[theta], p=P_LOG_SIGN, scale=SCALE
            )
        return lambda: (theta, *problem.read_state(state))

    return call


def unroll_with(functions: object, problem: Problem) -> Call:
    """Forward + backward of the unroll of `metafast` or of its reference."""
    leaves, state = problem.leaves(), problem.state(problem.params.dtype)

    def call() -> Read:
        if problem.is_meta:
            (thetas,), _ = functions.meta_lstm_unroll(
                [problem.params], [problem.grads], problem.losses, state, leaves, p=P_LOG_SIGN
            )
        else:
            (thetas,), _ = functions.lstm_optimizer_unroll(
                [problem.grads], state, leaves, params=[problem.params], p=P_LOG_SIGN, scale=SCALE
            )
        grads = torch.autograd.grad(thetas, leaves, problem.grad_out)
        return lambda: (thetas, *grads)

    return call


def metafast_unroll(problem: Problem) -> Call:
    return unroll_with(metafast, problem)


def metafast_unroll_graphed(problem: Problem) -> Call:
    return graphed(metafast_unroll(problem))


# --- the right results ------------------------------------------------------------------------------------


def expected(problem: Problem, unroll: bool, state_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of the float64 reference, in parts that stay small: (theta, state ...) of a step, (thetas, gradients of
    the weights ...) of an unroll. A state of another dtype is rounded before and after the step."""
    size, part = problem.params.numel(), 2**17 if problem.params.is_cuda else 2**15
    found = []
    for start in range(0, size, part):
        some = problem.double_part(start, min(size, start + part))
        found.append(unroll_with(reference, some)() if unroll else _step(some, state_dtype))
    results = [list(read()) for read in found]
    if unroll:
        thetas, *grads = zip(*results, strict=True)
        return [torch.cat(thetas, 1).detach(), *(sum(g) for g in grads)]
    dims = [0, 1, 1, 0]  # the dimension of the coordinates in theta, hidden, cell and gates
    return [torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), dims, strict=False)]


def _step(problem: Problem, state_dtype: torch.dtype | None) -> Read:
    state, functions = problem.state(state_dtype or torch.float64), reference
    arguments = (state, problem.weights)
    if problem.is_meta:
        (theta,), state = functions.meta_lstm_step(
            [problem.params], [problem.grads[0]], problem.losses[0], *arguments, p=P_LOG_SIGN
        )
    else:
        (theta,), state = functions.lstm_optimizer_step(
            [problem.grads[0]], *arguments, params=[problem.params], p=P_LOG_SIGN, scale=SCALE
        )
    return lambda: (theta, *(t.double() for t in problem.read_state(state)))


# --- the sizes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One step of P coordinates or, with `steps`, the unroll of so many, forward + backward."""

    kind: str  # "LSTM optimizer" or "meta-LSTM"
    coordinates: int
    steps: int | None = None
    units: int = 20

    def __str__(self) -> str:
        what = "step" if self.steps is None else f"unroll K={self.steps} forward + backward"
        return f"{self.kind} {what} P={self.coordinates:.0e}".replace("e+0", "e")

    @property
    def is_meta(self) -> bool:
        return self.kind == "meta-LSTM"

    @property
    def layers(self) -> int:
        """Andrychowicz et al. 2016; Ravi & Larochelle 2017: one below the layer whose cell is theta."""
        return 1 if self.is_meta else 2

    def problem(self, device: torch.device) -> Problem:
        random = torch.Generator(device).manual_seed(0)
        steps, size, units = self.steps or 1, self.coordinates, self.units
        inputs = [4 if self.is_meta else 2] + [units] * (self.layers - 1)
        head = [(2, units + 2), (2,)] if self.is_meta else [(1, units), (1,)]
        of_layers = [s for i in inputs for s in ((4 * units, i), (4 * units, units), (4 * units,))]

        def uniform(*shape: int, low: float = -1, high: float = 1) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=random, device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        tensors = {
            "params": 0.1 * normal(size),
            "grads": normal(steps, size) * 10 ** uniform(steps, size, low=-6, high=0),
            "losses": uniform(steps, low=0.5, high=2) if self.is_meta else None,
            "hidden": uniform(self.layers, size, units),
            "cell": normal(self.layers, size, units),
            "gates": uniform(size, 2, low=0) if self.is_meta else torch.zeros(size, 0, device=device),
            "grad_out": normal(steps, size),
        }
        return Problem([uniform(*shape) / math.sqrt(units) for shape in (*of_layers, *head)], **tensors)

    # --- floors -------------------------------------------------------------------------------------------

    def _multiply_adds(self) -> tuple[int, int]:
        """Of a coordinate and step: forward, and backward to state and theta, which leaves out the inputs.

        The loss is the same for all coordinates, so that its part of the products is done once for all.
        """
        units, layers = self.units, self.layers
        head = 2 * (units + 2) if self.is_meta else units
        of_inputs = 4 * units * 2
        forward = of_inputs + 4 * units * units * (2 * layers - 1) + head
        return forward, forward - of_inputs

    def flops(self) -> float:
        """The matrix products: of an unroll forward, and backward to the states and to the weights."""
        forward, backward = self._multiply_adds()
        if self.steps is None:
            return 2 * self.coordinates * forward
        return 2 * self.coordinates * self.steps * (2 * forward + backward)

    def recomputing_flops(self) -> float:
        """Of an unroll whose backward runs the steps again, in place of keeping what they did."""
        return self.flops() + 2 * self.coordinates * self.steps * self._multiply_adds()[0]

    def exponentials(self) -> float:
        """One for each sigmoid and tanh, of which a unit has five."""
        of_step = 5 * self.units * self.layers + (2 if self.is_meta else 0)
        return self.coordinates * (self.steps or 1) * of_step

    def traffic(self) -> float:
        """Bytes. Step: the state and theta are read and written, the gradient is read. Unroll: the gradients
        and those of the results are read, the results written, the first state read and the last written."""
        state = 2 * self.layers * self.units + (2 if self.is_meta else 0)
        return 4 * self.coordinates * (2 * state + 1 + (2 if self.steps is None else 3 * self.steps))
