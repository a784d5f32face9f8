"""Learned optimizers in JAX, with coordinates last, which suits XLA best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.common.in_jax import JaxCall, from_torch, import_jax, to_torch
from bench.learned_optimizer.peers.by_hand import layers_of
from bench.learned_optimizer.peers.pytorch import TINY
from bench.learned_optimizer.workloads import P_LOG_SIGN, SCALE, Problem, Read


def _advance_of(problem: Problem) -> Callable[..., Any]:
    """(weights, (theta, state), grad, loss) -> (theta, state)

    weights: (layers [(weight [4H, I + H], bias [4H, 1]) ...], head, head bias);
    state: ([(h, c) [H, P] of each layer ...], gates [2, P] of the meta-LSTM, else [0, P]).
    """
    import jax
    import jax.numpy as jnp

    def log_sign(g: Any) -> Any:
        size = jnp.maximum(jnp.log(jnp.abs(g)) / P_LOG_SIGN, -1)
        return jnp.stack((size, jnp.clip(g / TINY, -1, 1)))

    def advance(weights: Any, carry: Any, grad: Any, loss: Any) -> Any:
        (layers, head, head_bias), (theta, (states, gates)) = weights, carry
        x, new = log_sign(grad), []
        if problem.is_meta:
            x = jnp.concatenate((x, jnp.broadcast_to(log_sign(loss)[:, None], x.shape)))
        for (weight, bias), (h, c) in zip(layers, states, strict=True):
            i, f, o, g = jnp.split(weight @ jnp.concatenate((x, h)) + bias, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            x = jax.nn.sigmoid(o) * jnp.tanh(c)
            new.append((x, c))
        if problem.is_meta:
            known = head[:, :-2] @ x + head_bias[:, None] + head[:, -2:-1] * theta
            gates = jax.nn.sigmoid(known + head[:, -1:] * gates)
            theta = gates[1] * theta - gates[0] * grad
        else:
            theta = theta + SCALE * ((head @ x)[0] + head_bias)
        return theta, (new, gates)

    return advance


def _weights(problem: Problem) -> Any:
    layers = [(from_torch(layer.weight), from_torch(layer.bias)) for layer in layers_of(problem)]
    return layers, *(from_torch(w) for w in problem.weights[-2:])


def _start(problem: Problem) -> Any:
    states = [(from_torch(h.T), from_torch(c.T)) for h, c in zip(problem.hidden, problem.cell, strict=True)]
    return from_torch(problem.params), (states, from_torch(problem.gates.T))


def step(problem: Problem) -> JaxCall:
    """The old state is donated: its memory is the new one's."""
    device = problem.params.device
    jax = import_jax(device)
    advance = jax.jit(_advance_of(problem), donate_argnums=1)
    weights, carry, grad = _weights(problem), _start(problem), from_torch(problem.grads[0])
    loss = from_torch(problem.losses[0]) if problem.is_meta else None

    def run() -> Any:
        nonlocal carry
        carry = advance(weights, carry, grad, loss)
        return carry

    def read() -> Sequence[Tensor]:
        theta, *states, gates = to_torch(carry)
        rows = [torch.stack([t.T for t in states[part::2]]) for part in range(2)]  # h, c of each layer
        return theta, *rows, *([gates.T] if problem.is_meta else [])

    return JaxCall(device, run, lambda _: read)


def unroll(problem: Problem) -> JaxCall:
    device = problem.params.device
    jax = import_jax(device)
    advance = _advance_of(problem)

    def thetas_of(weights: Any, start: Any, grads: Any, losses: Any) -> Any:
        def body(carry: Any, of_step: Any) -> Any:
            carry = advance(weights, carry, *of_step)
            return carry, carry[0]

        return jax.lax.scan(body, start, (grads, losses))[1]

    def forward_backward(weights: Any, start: Any, grads: Any, losses: Any, grad_out: Any) -> Any:
        thetas, pull = jax.vjp(lambda w: thetas_of(w, start, grads, losses), weights)
        return thetas, pull(grad_out)[0]

    function = jax.jit(forward_backward)
    losses = from_torch(problem.losses) if problem.is_meta else None
    data = (from_torch(problem.grads), losses, from_torch(problem.grad_out))
    arguments = (_weights(problem), _start(problem), *data)

    def result_of(found: Any) -> Read:
        def read() -> Sequence[Tensor]:
            thetas, *grads = to_torch(found)
            head = 2 * problem.layers
            pairs = zip(layers_of(problem), grads[:head:2], grads[1:head:2], strict=True)
            of_layers = [g for layer, *of in pairs for g in layer.in_torch_order(*of)]
            return thetas, *of_layers, *grads[head:]

        return read

    return JaxCall(device, lambda: function(*arguments), result_of)
