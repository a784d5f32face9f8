"""The inner loop in JAX: jit(value_and_grad(vmap))."""

from __future__ import annotations

from typing import Any

from bench.common.in_jax import JaxCall, from_torch, import_jax
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

    def query_loss(params: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(problem.steps):
            grads = jax.grad(task_loss)(params, support_x, support_y)
            if problem.first_order:
                grads = jax.lax.stop_gradient(grads)
            params = [p - LEARNING_RATE * g for p, g in zip(params, grads, strict=True)]
        return task_loss(params, query_x, query_y)

    def mean_loss(params: Any, *data: Any) -> Any:
        return jax.vmap(query_loss, in_axes=(None, 0, 0, 0, 0))(params, *data).mean()

    step = jax.jit(jax.value_and_grad(mean_loss))
    params = [from_torch(p) for p in problem.params]
    data = [from_torch(t) for t in problem.data]
    return JaxCall(device, lambda: step(params, *data))
