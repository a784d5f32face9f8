"""The inner loop and its meta-gradient as people write them today in PyTorch.

Each function of a problem returns the call to time: (query loss, the meta-gradient of the shared parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inner_loop.workloads import LEARNING_RATE, Call, Problem, Result


def mlp(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of one task: x [B, D] -> [B, O]"""
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, params[-2], params[-1])


def sgd(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return [p - LEARNING_RATE * g for p, g in zip(params, grads, strict=True)]


# --- a loop over tasks ------------------------------------------------------------------------------------


def each_task(
    problem: Problem, params: Sequence[Tensor], query_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Call:
    """`query_loss(support_x, support_y, query_x, query_y)` of one task reaches `params` by its backward.

    Which comes after every task, so that one task's graph is held at a time.
    """

    def call() -> Result:
        for p in params:
            p.grad = None
        total = torch.zeros((), device=params[0].device)
        for task in zip(*problem.data, strict=True):
            loss = query_loss(*task)
            loss.backward()
            total += loss.detach()
        return (total / problem.tasks, *(p.grad / problem.tasks for p in params))

    return call


def plain_loop(problem: Problem) -> Call:
    leaves = problem.leaves()

    def query_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        theta = leaves
        for _ in range(problem.steps):
            loss = problem.loss_of(mlp(theta, support_x), support_y)
            theta = sgd(theta, torch.autograd.grad(loss, theta, create_graph=not problem.first_order))
        return problem.loss_of(mlp(theta, query_x), query_y)

    return each_task(problem, leaves, query_loss)


# --- torch.func -------------------------------------------------------------------------------------------


def torch_func(problem: Problem, compiled: bool = False) -> Call:
    def task_loss(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss_of(mlp(params, x), y)

    def query_loss(params: Sequence[Tensor], *task: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = task
        for _ in range(problem.steps):
            grads = torch.func.grad(task_loss)(params, support_x, support_y)
            if problem.first_order:
                grads = [g.detach() for g in grads]
            params = sgd(params, grads)
        return task_loss(params, query_x, query_y)

    def mean_loss(params: Sequence[Tensor], *data: Tensor) -> Tensor:
        return torch.func.vmap(query_loss, in_dims=(None, 0, 0, 0, 0))(params, *data).mean()

    def step(params: Sequence[Tensor], *data: Tensor) -> Result:
        grads, loss = torch.func.grad_and_value(mean_loss)(params, *data)
        return (loss, *grads)

    function = torch.compile(step, dynamic=False) if compiled else step
    return lambda: function(list(problem.params), *problem.data)


# --- batched, by autograd -----------------------------------------------------------------------------------
# Parameters W [T, O, I] and b [T, 1, O]; one bmm for each matrix product of all tasks.


def per_task(params: Sequence[Tensor], tasks: int) -> list[Tensor]:
    return [(p if p.dim() == 2 else p.unsqueeze(0)).expand(tasks, -1, -1) for p in params]


def bmm_autograd(problem: Problem) -> Call:
    leaves = problem.leaves()

    def total_loss(theta: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The sum over tasks of each task's mean."""
        for weight, bias in zip(theta[:-2:2], theta[1:-2:2], strict=True):
            x = torch.baddbmm(bias, x, weight.mT).relu()
        out = torch.baddbmm(theta[-1], x, theta[-2].mT)
        # Tasks are of one size, so that the sum of means is the mean of all times T.
        return problem.loss_of(out.flatten(0, 1), y.flatten(0, 1)) * problem.tasks

    def call() -> Result:
        theta = per_task(leaves, problem.tasks)
        for _ in range(problem.steps):
            loss = total_loss(theta, problem.support_x, problem.support_y)
            theta = sgd(theta, torch.autograd.grad(loss, theta, create_graph=not problem.first_order))
        loss = total_loss(theta, problem.query_x, problem.query_y) / problem.tasks
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return call
