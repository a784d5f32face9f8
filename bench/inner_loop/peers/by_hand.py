"""The inner loop of all tasks by batched products, the meta-gradient by Hessian-vector products, no autograd.

Parameters W [T, O, I] and b [T, 1, O]; one bmm for each matrix product of all tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.cuda_graph import graphed
from bench.inner_loop.peers.pytorch import per_task, sgd
from bench.inner_loop.workloads import Call, Problem, Result


def _shared_gradient(grads: Sequence[Tensor], tasks: int) -> list[Tensor]:
    """The mean over tasks, of [T, O, I] and [T, 1, O]."""
    return [g.sum(0).div_(tasks) if i % 2 == 0 else g.sum((0, 1)).div_(tasks) for i, g in enumerate(grads)]


class _Layers:
    """Forward, backward and Hessian-vector product of all tasks' MLPs at one theta, without autograd."""

    def __init__(self, theta: Sequence[Tensor], x: Tensor, y: Tensor, loss: str) -> None:
        self.weights, self.loss, self.y = theta[::2], loss, y
        self.inputs = [x]  # of each layer, [T, B, I]
        for weight, bias in zip(theta[:-2:2], theta[1:-2:2], strict=True):
            self.inputs.append(torch.baddbmm(bias, self.inputs[-1], weight.mT).relu_())
        self.out = torch.baddbmm(theta[-1], self.inputs[-1], theta[-2].mT)
        self.probabilities = None if loss == "mse" else self.out.softmax(-1)

    def losses(self) -> Tensor:
        """The mean over all tasks and examples."""
        if self.loss == "mse":
            return F.mse_loss(self.out, self.y)
        return F.cross_entropy(self.out.flatten(0, 1), self.y.flatten())

    def gradient(self) -> list[Tensor]:
        """Of each task's mean loss; keeps the deltas for `hessian_product`."""
        examples = self.y.shape[1]
        if self.loss == "mse":
            delta = (self.out - self.y) * (2 / examples)
        else:
            one_hot = F.one_hot(self.y, self.out.shape[-1])
            delta = (self.probabilities - one_hot) / examples
        self.deltas, grads = [delta], []
        for layer in reversed(range(len(self.weights))):
            grads[:0] = [delta.mT @ self.inputs[layer], delta.sum(1, keepdim=True)]
            if layer:
                delta = (delta @ self.weights[layer]) * (self.inputs[layer] > 0)
                self.deltas.insert(0, delta)
        return grads

    def hessian_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Forward over reverse: a dot is the derivative along `direction`, which is as theta."""
        input_dots: list[Tensor | None] = [None]  # the support does not move
        for layer, weight in enumerate(self.weights):
            dot = torch.baddbmm(direction[2 * layer + 1], self.inputs[layer], direction[2 * layer].mT)
            if layer:
                dot = torch.baddbmm(dot, input_dots[-1], weight.mT)
            if layer + 1 < len(self.weights):
                input_dots.append(dot * (self.inputs[layer + 1] > 0))
        examples = self.y.shape[1]
        if self.loss == "mse":
            delta_dot = dot * (2 / examples)
        else:
            p = self.probabilities
            delta_dot = p * (dot - (p * dot).sum(-1, keepdim=True)) / examples
        products: list[Tensor] = []
        for layer in reversed(range(len(self.weights))):
            of_weight = delta_dot.mT @ self.inputs[layer]
            if layer:
                of_weight = torch.baddbmm(of_weight, self.deltas[layer].mT, input_dots[layer])
            products[:0] = [of_weight, delta_dot.sum(1, keepdim=True)]
            if layer:
                delta_dot = torch.baddbmm(
                    delta_dot @ self.weights[layer], self.deltas[layer], direction[2 * layer]
                ) * (self.inputs[layer] > 0)
        return products


def _by_hand(problem: Problem, params: Sequence[Tensor], *data: Tensor) -> Result:
    support_x, support_y, query_x, query_y = data
    theta, steps = per_task(params, problem.tasks), []
    for _ in range(problem.steps):
        layers = _Layers(theta, support_x, support_y, problem.loss)
        theta = sgd(theta, layers.gradient())
        if not problem.first_order:
            steps.append(layers)
    query = _Layers(theta, query_x, query_y, problem.loss)
    v = query.gradient()
    for layers in reversed(steps):
        v = sgd(v, layers.hessian_product(v))
    return (query.losses(), *_shared_gradient(v, problem.tasks))


def bmm_by_hand(problem: Problem, compiled: bool = False) -> Call:
    """The reverse recursion with Hessian-vector products, no graph; activations of all steps are kept."""
    function = functools.partial(_by_hand, problem)
    if compiled:
        function = torch.compile(function, dynamic=False)

    @torch.no_grad()
    def call() -> Result:
        return function(list(problem.params), *problem.data)

    return call


def bmm_by_hand_graphed(problem: Problem) -> Call:
    return graphed(bmm_by_hand(problem))
