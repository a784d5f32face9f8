"""The path "torch.func": all tasks at once, by `vmap` over `grad` of a module's double.

The backward of the steps holds the graph of all of them, for all tasks, unless they are checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metafast.adaptation.examples import Examples, at
from metafast.adaptation.inner_loop import LearningRates, Momenta, Rate
from metafast.adaptation.states import State, States, Tensors
from metafast.adaptation.task import Task

# They run in functions that vmap knows only below grad.
_BELOW_GRAD = (nn.RNNBase, nn.RNNCellBase)


def train(
    task: Task, start: States, rates: LearningRates, x: Examples, y: Examples, weights: Tensor | None
) -> States:
    """The parameters and buffers of the tasks after all steps."""
    inner = task.inner
    params, buffers = start.stacked()
    first = params

    def gradient(params: Tensors, buffers: Tensors, first: Tensors, *examples: Any) -> State:
        grads, buffers = torch.func.grad(task.loss, has_aux=True)(params, buffers, first, *examples)
        return task.clipped(grads), buffers

    of_tasks = torch.vmap(gradient, randomness="different")

    def moved(
        params: Tensors, buffers: Tensors, momenta: Momenta, rate: Rate, first: Tensors, of_step: Examples
    ) -> tuple[Tensors, Tensors, list[Tensor]]:
        with torch.no_grad() if inner.first_order else nullcontext():  # torch.func.grad works in either
            grads, buffers = of_tasks(params, buffers, first, *of_step)
        params, momenta = inner.moved(params, grads, rate, momenta)
        return params, buffers, momenta

    momenta: Momenta = None
    for step in range(inner.steps):
        examples = (x, y) if weights is None else (x, y, weights)
        examples = at(examples, step) if inner.per_step else examples
        params, buffers, momenta = task.step(moved, params, buffers, momenta, rates.at(step), first, examples)
    return States(start.tasks, (params, buffers))


def call(task: Task, states: States, x: Examples) -> Any:
    """The outputs of the tasks, [T, ...]."""

    def output(params: Tensors, buffers: Tensors, x: Examples) -> Any:
        return task.call(params, buffers, x)[0]

    def below_grad(params: Tensors, *others: Any) -> Any:
        return torch.func.vjp(lambda params: output(params, *others), params)[0]

    def of_tasks(function: Callable[..., Any]) -> Any:
        return torch.vmap(function, randomness="different")(*states.stacked(), x)

    if any(isinstance(part, _BELOW_GRAD) for part in task.scratch.module.modules()):
        return of_tasks(below_grad)
    try:
        return of_tasks(output)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        return of_tasks(below_grad)
