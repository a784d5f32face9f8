"""A meta-step in PyTorch: a plain loop over tasks, and vmap of torch.func over them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common.cuda_graph import graphed
from bench.networks.workloads import LEARNING_RATE, Problem

Result = tuple[Tensor, ...]  # the loss, and the gradients of the parameters


def loop(problem: Problem) -> Callable[[], Result]:
    """`functional_call` and `torch.autograd.grad`, one task after the other."""
    module = problem.module

    @sdpa_kernel(SDPBackend.MATH)  # torch's faster attention has no second derivative
    def call() -> Result:
        losses = []
        for x, y, query_x, query_y in zip(*problem.data, strict=True):
            theta = dict(module.named_parameters())
            for _ in range(problem.steps):
                loss = F.cross_entropy(torch.func.functional_call(module, theta, (x,)), y)
                grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                theta = {n: p - LEARNING_RATE * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            losses.append(F.cross_entropy(torch.func.functional_call(module, theta, (query_x,)), query_y))
        loss = torch.stack(losses).mean()
        return loss, *torch.autograd.grad(loss, problem.parameters)

    return call


def loop_graphed(
    problem: Problem, under: Callable[[Callable[[], object]], Callable[[], object]]
) -> Callable[[], Result]:
    """The loop, a task's steps and meta-gradient as one CUDA graph, replayed for each task.

    `under` puts a call under the settings that it is captured in.
    """
    one = problem.of_one_task()
    gradient = loop(one)
    totals = [torch.zeros((), device=one.data[0].device), *map(torch.zeros_like, problem.parameters)]

    def add() -> None:
        loss, *grads = gradient()
        torch._foreach_add_(totals, [loss.detach(), *grads], alpha=1 / problem.tasks)

    replay = graphed(under(add), totals)

    def call() -> Result:
        torch._foreach_zero_(totals)
        for task in zip(*(x.split(1) for x in problem.data), strict=True):
            torch._foreach_copy_(one.data, task)
            replay()
        return tuple(totals)

    return call


def transforms(problem: Problem, *, compiled: bool = False) -> Callable[[], Result]:
    """vmap over tasks of grad over steps, as torch.func's tutorial has it (its batch norm in training is
    wrong there); compiled with the meta-gradient, which torch.compile takes as a transform alone."""
    module = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(problem.module))

    def loss_of(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module, theta, (x,)), y)

    def query_loss(
        theta: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        for _ in range(problem.steps):
            grads = torch.func.grad(loss_of)(theta, x, y)
            theta = {name: p - LEARNING_RATE * grads[name] for name, p in theta.items()}
        return loss_of(theta, query_x, query_y)

    def mean_loss(theta: dict[str, Tensor], *data: Tensor) -> Tensor:
        return torch.vmap(query_loss, (None, 0, 0, 0, 0))(theta, *data).mean()

    theta = dict(problem.module.named_parameters())
    if compiled:
        of_compiled = torch.compile(torch.func.grad_and_value(mean_loss), dynamic=False)

    @sdpa_kernel(SDPBackend.MATH)
    def call() -> Result:
        if compiled:
            grads, loss = of_compiled({name: p.detach() for name, p in theta.items()}, *problem.data)
            return loss, *grads.values()
        loss = mean_loss(theta, *problem.data)
        return loss, *torch.autograd.grad(loss, problem.parameters)

    return call
