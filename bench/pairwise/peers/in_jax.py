"""The competitors in JAX, jitted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.common.in_jax import JaxCall, from_torch, import_jax


def jitted(
    device: torch.device, function: Callable, tensors: Sequence[Tensor], backward: bool, **constants: Any
) -> JaxCall:
    """-> the function's value or, with `backward`, (value, gradients of the tensors)"""
    jax = import_jax(device)
    constants = {name: from_torch(c) if isinstance(c, Tensor) else c for name, c in constants.items()}
    function = functools.partial(function, **constants)
    if backward:
        function = jax.value_and_grad(function, tuple(range(len(tensors))))
    compiled, arrays = jax.jit(function), [from_torch(t) for t in tensors]
    return JaxCall(device, lambda: compiled(*arrays))


def distance(x: Tensor, y: Tensor, grad: Tensor, backward: bool) -> JaxCall:
    """-> (distances,) or, with `backward`, (distances, gradients of x and y)"""
    jax = import_jax(x.device)

    def forward_backward(x: Any, y: Any, grad: Any) -> Any:
        out, pullback = jax.vjp(sqeuclidean, x, y)
        return (out, *pullback(grad))

    compiled = jax.jit(forward_backward if backward else lambda x, y, _: (sqeuclidean(x, y),))
    arrays = [from_torch(t) for t in (x, y, grad)]
    return JaxCall(x.device, lambda: compiled(*arrays))


def class_means(support: Any, way: int) -> Any:
    return support.reshape(*support.shape[:-2], way, -1, support.shape[-1]).mean(-2)


def _nll(log_probs: Any, labels: Any) -> Any:
    import jax.numpy as jnp

    return -jnp.take_along_axis(log_probs, labels[..., None], -1).mean()


def prototypical_loss(support: Any, query: Any, *, labels: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    prototypes = class_means(support, way)
    logits = 2 * jnp.einsum("...qd,...nd->...qn", query, prototypes) - (prototypes**2).sum(-1)[..., None, :]
    return _nll(jax.nn.log_softmax(logits), labels)


def matching_loss(support: Any, query: Any, *, labels: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    def unit(x: Any) -> Any:
        return x / jnp.sqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-16))

    query, support = unit(query), unit(support)
    log_attention = jax.nn.log_softmax(jnp.einsum("...qd,...sd->...qs", query, support))
    if support.shape[-2] != way:
        log_attention = jax.nn.logsumexp(log_attention.reshape(*log_attention.shape[:-1], way, -1), -1)
    return _nll(log_attention, labels)


def relation_loss(support: Any, query: Any, *head: Any, targets: Any, way: int) -> Any:
    import jax
    import jax.numpy as jnp

    weight, bias, out_weight, out_bias = head
    of_query, of_class = jnp.split(weight, 2, 1)
    query = jnp.einsum("...qd,hd->...qh", query, of_query)
    prototypes = jnp.einsum("...nd,hd->...nh", class_means(support, way), of_class) + bias
    hidden = jax.nn.relu(query[..., :, None, :] + prototypes[..., None, :, :])
    scores = jax.nn.sigmoid(jnp.einsum("...qnh,h->...qn", hidden, out_weight[0]) + out_bias[0])
    return ((scores - targets) ** 2).mean()


def sqeuclidean(x: Any, y: Any) -> Any:
    import jax.numpy as jnp

    return (x**2).sum(-1)[:, None] - 2 * jnp.einsum("qd,nd->qn", x, y) + (y**2).sum(-1)
