"""The path "loop": the tasks one after the other, by plain autograd on a module's double.

It takes whatever autograd takes, branches on values and writes in place among it. The backward of the steps
holds the graph of all of them, as on the other path, unless the steps are checkpointed; without a graph, or
with first order, the memory of a step is one task's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast.adaptation.examples import Examples, at, stacked
from metafast.adaptation.inner_loop import LearningRates, Momenta, Rate
from metafast.adaptation.states import State, States, Tensors
from metafast.adaptation.task import Task


def train(
    task: Task, start: States, rates: LearningRates, x: Examples, y: Examples, weights: Tensor | None
) -> States:
    """The parameters and buffers of the tasks after all steps."""
    examples = (x, y) if weights is None else (x, y, weights)
    ends: list[State] = []
    for number, (params, buffers) in enumerate(start.each()):
        try:
            ends.append(_train_one(task, params, buffers, rates, examples, number))
        except ValueError as error:
            if " of task 0" not in str(error):
                raise
            raise ValueError(str(error).replace("of task 0", f"of task {number}")) from None  # of its labels
    return States(start.tasks, each=ends)


def _train_one(
    task: Task, params: Tensors, buffers: Tensors, rates: LearningRates, examples: Examples, number: int
) -> State:
    inner, records = task.inner, torch.is_grad_enabled()
    create_graph = records and not inner.first_order

    def leaf(tensor: Tensor) -> Tensor:
        """To differentiate by: of the caller's graph, if there is one. A module may write into it."""
        connected = records and tensor.requires_grad
        return tensor.clone() if connected else tensor.detach().clone().requires_grad_()

    def moved(
        params: Tensors, buffers: Tensors, momenta: Momenta, rate: Rate, first: Tensors, of_step: Examples
    ) -> tuple[Tensors, Tensors, list[Tensor]]:
        task.scratch.renew()
        with torch.enable_grad():
            value, buffers = task.loss(params, buffers, first, *of_step)
            grads = task.clipped(_gradient(value, params, create_graph))
        if not create_graph:
            buffers = {name: buffer.detach() for name, buffer in buffers.items()}
        params, momenta = inner.moved(params, grads, rate, momenta)
        return params, buffers, momenta

    params = {name: leaf(param) for name, param in params.items()}
    first = dict(params)
    momenta: Momenta = None
    for step in range(inner.steps):
        of_step = at(examples, step, number) if inner.per_step else at(examples, number)
        params, buffers, momenta = task.step(moved, params, buffers, momenta, rates.at(step), first, of_step)
        if not records:
            params = {name: param.requires_grad_() for name, param in params.items()}
    return (params if records else {name: param.detach() for name, param in params.items()}), buffers


def _gradient(value: Tensor, params: Tensors, create_graph: bool) -> Tensors:
    """That of what the loss does not depend on is zero."""
    if not value.requires_grad:
        return {name: torch.zeros_like(param) for name, param in params.items()}
    found = torch.autograd.grad(
        value, list(params.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(params, found, strict=True))


def call(task: Task, states: States, x: Examples) -> Any:
    """The outputs of the tasks, [T, ...]."""
    outputs = []
    for number, state in enumerate(states.each()):
        task.scratch.renew()
        outputs.append(task.call(*state, at(x, number))[0])
    return stacked(outputs)
