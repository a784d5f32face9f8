"""The inner loop in JAX: jit(value_and_grad(vmap))."""

from __future__ import annotations

from typing import Any

from bench.common.in_jax import JaxCall, import_jax, meta_step
from bench.inner_loop.workloads import LEARNING_RATE, Problem


def vmap(problem: Problem) -> JaxCall:
    device = problem.support_x.device
    jax = import_jax(device)
    import jax.numpy as jnp

    def task_loss(params: Any, x: Any, y: Any) -> Any:
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = jax.nn.relu(x @ weight.T + bias)
        out = x @ params[-2].T + params[-1]
        if problem.loss == "mse":
            return ((out - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1).mean()

    return meta_step(
        device,
        task_loss,
        problem.params,
        problem.data,
        steps=problem.steps,
        lr=LEARNING_RATE,
        first_order=problem.first_order,
    )
