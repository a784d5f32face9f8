"""Learned optimizers in JAX, with coordinates last, which suits XLA best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._learned_optimizer_by_hand import layers_of
from bench._learned_optimizer_peers import TINY
from bench._learned_optimizer_workloads import P_LOG_SIGN, SCALE, Call, Problem, Read
from bench._peers import import_jax, jax_array


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
    layers = [(jax_array(layer.weight), jax_array(layer.bias)) for layer in layers_of(problem)]
    return layers, *(jax_array(w) for w in problem.weights[-2:])


def _start(problem: Problem) -> Any:
    states = [(jax_array(h.T), jax_array(c.T)) for h, c in zip(problem.hidden, problem.cell, strict=True)]
    return jax_array(problem.params), (states, jax_array(problem.gates.T))


def _tensor(array: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array))


def step(problem: Problem) -> Call:
    """The old state is donated: its memory is the new one's."""
    jax = import_jax(problem.params.device)
    advance = jax.jit(_advance_of(problem), donate_argnums=1)
    weights, carry, grad = _weights(problem), _start(problem), jax_array(problem.grads[0])
    loss = jax_array(problem.losses[0]) if problem.is_meta else None

    def read() -> Sequence[Tensor]:
        theta, (states, gates) = carry
        rows = [torch.stack([_tensor(t).T for t in part]) for part in zip(*states, strict=True)]
        return _tensor(theta), *rows, *([_tensor(gates).T] if problem.is_meta else [])

    def call() -> Read:
        nonlocal carry
        carry = jax.block_until_ready(advance(weights, carry, grad, loss))
        return read

    return call


def unroll(problem: Problem) -> Call:
    jax = import_jax(problem.params.device)
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
    losses = jax_array(problem.losses) if problem.is_meta else None
    data = (jax_array(problem.grads), losses, jax_array(problem.grad_out))
    arguments = (_weights(problem), _start(problem), *data)

    def call() -> Read:
        thetas, (layers, *head) = jax.block_until_ready(function(*arguments))

        def read() -> Sequence[Tensor]:
            pairs = zip(layers_of(problem), layers, strict=True)
            grads = [g for layer, of in pairs for g in layer.in_torch_order(*map(_tensor, of))]
            return _tensor(thetas), *grads, *map(_tensor, head)

        return read

    return call
