"""A meta-step of Conv4 in JAX: jit(value_and_grad(vmap))."""

from __future__ import annotations

from typing import Any

from bench.common.cases import Skip
from bench.common.in_jax import JaxCall, import_jax, meta_step
from bench.networks.workloads import LEARNING_RATE, Problem


def vmap(problem: Problem, precision: str | None = None) -> JaxCall:
    """`precision` of its products, as `jax.lax.Precision` names it; None: float32's."""
    if not problem.is_conv4:
        raise Skip("written for Conv4")
    device = problem.data[0].device
    jax = import_jax(device)
    import jax.numpy as jnp

    def task_loss(params: Any, x: Any, y: Any) -> Any:
        for weight, gamma, beta in zip(params[:-2:3], params[1:-2:3], params[2:-2:3], strict=True):
            z = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", precision=precision)
            mean, variance = z.mean((0, 2, 3), keepdims=True), z.var((0, 2, 3), keepdims=True)
            n = (z - mean) * jax.lax.rsqrt(variance + 1e-5)
            x = max_pool(jax.nn.relu(n * gamma[:, None, None] + beta[:, None, None]))
        out = jnp.matmul(x.reshape(len(x), -1), params[-2].T, precision=precision) + params[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1).mean()

    def max_pool(x: Any) -> Any:
        count, channels, height, width = x.shape
        x = x[:, :, : height // 2 * 2, : width // 2 * 2]
        return x.reshape(count, channels, height // 2, 2, width // 2, 2).max((3, 5))

    return meta_step(
        device, task_loss, problem.parameters, problem.data, steps=problem.steps, lr=LEARNING_RATE
    )
