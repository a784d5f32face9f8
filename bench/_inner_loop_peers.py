"""The inner loop and its meta-gradient as people write them today: in PyTorch, in JAX and with libraries.

Each `..._call(problem)` returns the call to time: (query loss, the meta-gradient of the shared parameters).
The loops over tasks go backward after every task, so that one task's graph is held at a time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._harness import Skip
from bench._inner_loop_workloads import LEARNING_RATE, Call, Problem, Result
from bench._peers import import_jax, jax_array


def mlp(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of one task: x [B, D] -> [B, O]"""
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, params[-2], params[-1])


def sgd(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    return [p - LEARNING_RATE * g for p, g in zip(params, grads, strict=True)]


# --- a loop over tasks ------------------------------------------------------------------------------------


def _each_task(
    problem: Problem, params: Sequence[Tensor], query_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Call:
    """`query_loss(support_x, support_y, query_x, query_y)` of one task reaches `params` by its backward."""

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

    return _each_task(problem, leaves, query_loss)


@functools.cache
def _import_learn2learn_maml() -> type[nn.Module]:
    """learn2learn.algorithms.MAML.

    The package imports torchvision, gym and qpth, of which MAML needs nothing: empty packages stand in for
    the two that enclose it during the import.
    """
    found = importlib.util.find_spec("learn2learn")
    if found is None or found.origin is None:
        raise Skip("learn2learn is not installed")
    root = Path(found.origin).parent
    stand_ins = {"learn2learn": root, "learn2learn.algorithms": root / "algorithms"}
    for name, folder in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    try:
        return importlib.import_module("learn2learn.algorithms.maml").MAML
    except ImportError as error:
        raise Skip(f"cannot import learn2learn: {error}") from None
    finally:
        for name in stand_ins:
            del sys.modules[name]


def learn2learn_loop(problem: Problem) -> Call:
    net = problem.module()
    maml = _import_learn2learn_maml()(net, lr=LEARNING_RATE, first_order=problem.first_order)

    def query_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(problem.steps):
            learner.adapt(problem.loss_of(learner(support_x), support_y))
        return problem.loss_of(learner(query_x), query_y)

    return _each_task(problem, list(net.parameters()), query_loss)


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"cannot import {name}: {error}") from None


def higher_loop(problem: Problem) -> Call:
    higher = _import("higher")
    net = problem.module()
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE)

    def call() -> Result:
        total, grads = torch.zeros((), device=params[0].device), [torch.zeros_like(p) for p in params]
        for support_x, support_y, query_x, query_y in zip(*problem.data, strict=True):
            with higher.innerloop_ctx(
                net, optimizer, copy_initial_weights=False, track_higher_grads=not problem.first_order
            ) as (functional, inner):
                for _ in range(problem.steps):
                    inner.step(problem.loss_of(functional(support_x), support_y))
                loss = problem.loss_of(functional(query_x), query_y)
                # Without higher gradients the adapted parameters are leaves: theirs is the first-order one.
                of = functional.parameters() if problem.first_order else params
                task_grads = torch.autograd.grad(loss, list(of))
                torch._foreach_add_(grads, task_grads)
                total += loss.detach()
        return (total / problem.tasks, *(g / problem.tasks for g in grads))

    return call


def torchopt_loop(problem: Problem) -> Call:
    if problem.first_order:
        raise Skip("its MetaSGD is second order always")
    torchopt = _import("torchopt")
    net = problem.module()
    params = list(net.parameters())
    optimizer = torchopt.MetaSGD(net, lr=LEARNING_RATE)
    states = [(part, torchopt.extract_state_dict(part, by="reference")) for part in (net, optimizer)]

    def query_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        for _ in range(problem.steps):
            optimizer.step(problem.loss_of(net(support_x), support_y))
        loss = problem.loss_of(net(query_x), query_y)
        for part, state in states:
            torchopt.recover_state_dict(part, state)
        return loss

    return _each_task(problem, params, query_loss)


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


# --- batched by hand --------------------------------------------------------------------------------------
# Parameters W [T, O, I] and b [T, 1, O]; one bmm for each matrix product of all tasks.


def _per_task(params: Sequence[Tensor], tasks: int) -> list[Tensor]:
    return [(p if p.dim() == 2 else p.unsqueeze(0)).expand(tasks, -1, -1) for p in params]


def _shared_gradient(grads: Sequence[Tensor], tasks: int) -> list[Tensor]:
    """The mean over tasks, of [T, O, I] and [T, 1, O]."""
    return [g.sum(0).div_(tasks) if i % 2 == 0 else g.sum((0, 1)).div_(tasks) for i, g in enumerate(grads)]


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
        theta = _per_task(leaves, problem.tasks)
        for _ in range(problem.steps):
            loss = total_loss(theta, problem.support_x, problem.support_y)
            theta = sgd(theta, torch.autograd.grad(loss, theta, create_graph=not problem.first_order))
        loss = total_loss(theta, problem.query_x, problem.query_y) / problem.tasks
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return call


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
    theta, steps = _per_task(params, problem.tasks), []
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
    """As one CUDA graph: no launch from Python."""
    call = bmm_by_hand(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


# --- JAX --------------------------------------------------------------------------------------------------


def jax_vmap(problem: Problem) -> Callable[[], Any]:
    jax = import_jax(problem.support_x.device)
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
    params = [jax_array(p) for p in problem.params]
    data = [jax_array(t.int() if t.dtype == torch.int64 else t) for t in problem.data]
    return lambda: jax.block_until_ready(step(params, *data))


def from_jax(result: Any) -> list[Tensor]:
    import numpy as np

    loss, grads = result
    return [torch.from_numpy(np.array(r)) for r in (loss, *grads)]
