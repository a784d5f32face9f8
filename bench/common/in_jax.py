"""JAX beside torch: the same device, the same precision, its results as tensors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import Skip


def import_jax(device: torch.device) -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of the GPU's memory
    try:
        jax = importlib.import_module("jax")
    except ImportError as error:
        raise Skip(f"cannot import jax: {error}") from None
    if (device.type == "cuda") != (jax.default_backend() == "gpu"):
        raise Skip(f"jax runs on {jax.default_backend()} here, not on {device.type}")
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU the default is TF32
    return jax


def from_torch(tensor: Tensor) -> Any:
    """A copy, int64 as int32: JAX has no other here."""
    import jax.numpy as jnp

    tensor = tensor.detach().int() if tensor.dtype == torch.int64 else tensor.detach()
    return jnp.array(tensor.cpu().numpy())


def to_torch(tree: Any) -> list[Tensor]:
    """The leaves of a result, on the CPU."""
    import jax
    import numpy as np

    return [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(tree)]


class JaxCall:
    """A call of JAX that returns as torch's do: on the CPU when the result is there, on a GPU when all is
    launched. `wait` returns when the last result is there.

    `result_of` makes of JAX's result what the call returns.
    """

    def __init__(
        self,
        device: torch.device,
        run: Callable[[], Any],
        result_of: Callable[[Any], Any] = lambda result: result,
    ) -> None:
        import jax

        self.run, self.result_of, self.block = run, result_of, jax.block_until_ready
        self.waits = device.type == "cpu"

    def __call__(self) -> Any:
        self.last = self.run()
        if self.waits:
            self.wait()
        return self.result_of(self.last)

    def wait(self) -> None:
        self.block(self.last)


def meta_step(
    device: torch.device,
    task_loss: Callable[[Any, Any, Any], Any],
    params: Sequence[Tensor],
    data: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
) -> JaxCall:
    """jit(value_and_grad(vmap)) of the query loss after some steps of SGD on the support.

    Args:
        task_loss: of parameters, x and y of one task.
        data: support x, y, query x, y of all tasks.
    """
    import jax

    def query_loss(params: Any, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(steps):
            grads = jax.grad(task_loss)(params, x, y)
            if first_order:
                grads = jax.lax.stop_gradient(grads)
            params = [p - lr * g for p, g in zip(params, grads, strict=True)]
        return task_loss(params, query_x, query_y)

    def mean_loss(params: Any, *data: Any) -> Any:
        return jax.vmap(query_loss, in_axes=(None, 0, 0, 0, 0))(params, *data).mean()

    step = jax.jit(jax.value_and_grad(mean_loss))
    weights, examples = ([from_torch(tensor) for tensor in tensors] for tensors in (params, data))
    return JaxCall(device, lambda: step(weights, *examples))
