"""Learned optimizers as people write them today: with torch's LSTMs, as matrix products, compiled.

Parameters are one flat tensor for all of them, with no loop over tensors. Each keeps its state in the layout
that it likes best. Of an unroll they get the recorded gradients, so that none differentiates through the
network that is trained.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common.cases import Skip
from bench.common.cuda_graph import graphed
from bench.learned_optimizer.workloads import P_LOG_SIGN, SCALE, Call, Problem, Read

State = tuple[Tensor, ...]  # as each model likes it; the last is gates [P, 2], or [P, 0]
TINY = math.exp(-P_LOG_SIGN)


def log_sign(g: Tensor) -> Tensor:
    """[...] -> [..., 2], with as few operations as it takes"""
    return torch.stack(((g.abs().log() / P_LOG_SIGN).clamp(min=-1), (g / TINY).clamp(-1, 1)), -1)


class Model(nn.Module):
    """The LSTM's layers, of which there are several kinds, and the head.

    `leaves` are the weights in metafast's order, `first_state` is the problem's.
    """

    leaves: list[Tensor]
    first_state: State

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.head, self.head_bias = (w.clone().requires_grad_() for w in problem.weights[-2:])

    def layers(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [P, I] -> h [P, H] of the last layer, and the new state but for the gates."""
        raise NotImplementedError

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        """hidden and cell, [L, P, H]"""
        raise NotImplementedError

    def inputs(self, grad: Tensor, loss: Tensor | None) -> Tensor:
        """[..., P] and [...] -> [..., P, I]"""
        x = log_sign(grad)
        if loss is None:
            return x
        return torch.cat((x, log_sign(loss).unsqueeze(-2).expand_as(x)), -1)

    def move(self, h: Tensor, theta: Tensor, grad: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        if not self.problem.is_meta:
            return theta + SCALE * F.linear(h, self.head, self.head_bias).squeeze(1), gates
        known = F.linear(h, self.head[:, :-2], self.head_bias)
        gates = (known + theta.unsqueeze(1) * self.head[:, -2] + gates * self.head[:, -1]).sigmoid()
        return gates[:, 1] * theta - gates[:, 0] * grad, gates

    def forward(self, theta: Tensor, state: State, grad: Tensor, loss: Tensor | None) -> tuple[Tensor, State]:
        h, layers = self.layers(self.inputs(grad, loss), state)
        theta, gates = self.move(h, theta, grad, state[-1])
        return theta, (*layers, gates)

    def unroll(self, advance: Callable[..., tuple[Tensor, State]]) -> Tensor:
        """`advance` is forward, or forward compiled; -> thetas [K, P]"""
        problem, theta, state, thetas = self.problem, self.problem.params, self.first_state, []
        for k, grad in enumerate(problem.grads):
            loss = problem.losses[k] if problem.is_meta else None
            theta, state = advance(theta, state, grad, loss)
            thetas.append(theta)
        return torch.stack(thetas)


class Cells(Model):
    """nn.LSTMCell for each layer, all coordinates a batch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.cells, self.leaves = nn.ModuleList(), []
        for weight_ih, weight_hh, bias in _layers_of(problem):
            cell = nn.LSTMCell(weight_ih.shape[1], weight_hh.shape[1], device=bias.device)
            _fill(
                (cell.weight_ih, weight_ih),
                (cell.weight_hh, weight_hh),
                (cell.bias_ih, bias),
                (cell.bias_hh, 0),
            )
            self.cells.append(cell)
            self.leaves += [cell.weight_ih, cell.weight_hh, cell.bias_ih]
        self.leaves += [self.head, self.head_bias]
        pairs = zip(problem.hidden, problem.cell, strict=True)
        self.first_state = (*(t for pair in pairs for t in pair), problem.gates)

    def layers(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        new: list[Tensor] = []
        for index, cell in enumerate(self.cells):
            new += cell(x, state[2 * index : 2 * index + 2])
            x = new[-2]
        return x, tuple(new)

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        return torch.stack(state[:-1:2]), torch.stack(state[1:-1:2])


class Products(Cells):
    """The cell by hand: two addmm and its nonlinearities."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        del self.cells
        self.leaves = problem.leaves()
        self.head, self.head_bias = self.leaves[-2:]

    def layers(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        new: list[Tensor] = []
        for index in range(self.problem.layers):
            weight_ih, weight_hh, bias = self.leaves[3 * index : 3 * index + 3]
            h, c = state[2 * index : 2 * index + 2]
            gates = torch.addmm(torch.addmm(bias, x, weight_ih.T), h, weight_hh.T)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            new += [x, c]
        return x, tuple(new)


class Transposed(Products):
    """With coordinates last in the state: each gate of all units is one piece of memory."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.first_state = (*(t.T.contiguous() for t in self.first_state[:-1]), problem.gates)

    def layers(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        x, new = x.T, []
        for index in range(self.problem.layers):
            weight_ih, weight_hh, bias = self.leaves[3 * index : 3 * index + 3]
            h, c = state[2 * index : 2 * index + 2]
            gates = torch.addmm(torch.addmm(bias.unsqueeze(1), weight_ih, x), weight_hh, h)
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            x = o.sigmoid() * c.tanh()
            new += [x, c]
        return x.T, tuple(new)

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        hidden, cell = super().read(state)
        return hidden.mT, cell.mT


class Lstm(Model):
    """nn.LSTM of all layers; an unroll is one call of it for all steps."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        layers, self.leaves = _layers_of(problem), []
        self.lstm = nn.LSTM(
            layers[0][0].shape[1], problem.units, problem.layers, device=problem.params.device
        )
        for (weight_ih, weight_hh, bias), own in zip(layers, self.lstm.all_weights, strict=True):
            _fill((own[0], weight_ih), (own[1], weight_hh), (own[2], bias), (own[3], 0))
            self.leaves += own[:3]
        self.leaves += [self.head, self.head_bias]
        self.first_state = (problem.hidden, problem.cell, problem.gates)

    def layers(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        out, new = self.lstm(x.unsqueeze(0), state[:2])
        return out[0], new

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        return state[0], state[1]

    def unroll(self, advance: Callable[..., tuple[Tensor, State]]) -> Tensor:
        problem = self.problem
        out, _ = self.lstm(self.inputs(problem.grads, problem.losses), self.first_state[:2])
        if not problem.is_meta:
            return problem.params + SCALE * F.linear(out, self.head, self.head_bias).squeeze(2).cumsum(0)
        theta, gates, thetas = problem.params, problem.gates, []
        for h, grad in zip(out, problem.grads, strict=True):
            theta, gates = self.move(h, theta, grad, gates)
            thetas.append(theta)
        return torch.stack(thetas)


def _layers_of(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    of = problem.weights[:-2]
    return list(zip(of[::3], of[1::3], of[2::3], strict=True))


@torch.no_grad()
def _fill(*pairs: tuple[nn.Parameter, Tensor | int]) -> None:
    for own, value in pairs:
        if isinstance(value, Tensor):
            own.copy_(value)
        else:
            own.fill_(value).requires_grad_(False)


def _compiled(model: Model) -> Callable[..., Any]:
    torch._dynamo.config.allow_rnn = True  # without it nn.LSTM stays as it is
    return torch.compile(model, dynamic=False)


def step(model: Callable[[Problem], Model], problem: Problem, compiled: bool = False) -> Call:
    made = model(problem)
    advance = _compiled(made) if compiled else made
    theta, state, grad = problem.params, made.first_state, problem.grads[0]
    loss = problem.losses[0] if problem.is_meta else None

    def read() -> tuple[Tensor, ...]:
        return theta, *made.read(state), *state[-1:][: problem.is_meta]

    @torch.no_grad()
    def call() -> Read:
        nonlocal theta, state
        theta, state = advance(theta, state, grad, loss)
        return read

    return call


def step_graphed(model: Callable[[Problem], Model], problem: Problem) -> Call:
    """The first step, from the same state every time."""
    made, loss = model(problem), problem.losses[0] if problem.is_meta else None

    @torch.no_grad()
    def call() -> Read:
        theta, state = made(problem.params, made.first_state, problem.grads[0], loss)
        return lambda: (theta, *made.read(state), *state[-1:][: problem.is_meta])

    return graphed(call)


def _forward_backward(made: Model, thetas_of: Callable[[], Tensor]) -> Call:
    def call() -> Read:
        thetas = thetas_of()
        grads = torch.autograd.grad(thetas, made.leaves, made.problem.grad_out)
        return lambda: (thetas, *grads)

    return call


def unroll(model: Callable[[Problem], Model], problem: Problem, compiled: bool = False) -> Call:
    """Autograd through all steps. Compiled is the step: all at once takes ten times as long to compile."""
    made = model(problem)
    return _forward_backward(made, functools.partial(made.unroll, _compiled(made) if compiled else made))


def lstm_unroll_compiled(problem: Problem) -> Call:
    """One call of nn.LSTM, whose backward not every torch can compile."""
    made = Lstm(problem)
    torch._dynamo.config.allow_rnn = True
    call = _forward_backward(made, torch.compile(functools.partial(made.unroll, made), dynamic=False))
    try:
        call()
    except Exception as error:  # of dynamo, of inductor, or what they ran into
        raise Skip(f"torch.compile: {str(error).strip().splitlines()[0][:80]}") from None
    return call
