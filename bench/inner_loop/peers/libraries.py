"""The inner loop with the libraries for it, task by task, as their users call them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common.cases import Skip
from bench.inner_loop.peers.pytorch import each_task
from bench.inner_loop.workloads import LEARNING_RATE, Call, Problem, Result


@functools.cache
def learn2learn_maml() -> type[nn.Module]:
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
    maml = learn2learn_maml()(net, lr=LEARNING_RATE, first_order=problem.first_order)

    def query_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(problem.steps):
            learner.adapt(problem.loss_of(learner(support_x), support_y))
        return problem.loss_of(learner(query_x), query_y)

    return each_task(problem, list(net.parameters()), query_loss)


def imported(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"cannot import {name}: {error}") from None


def higher_loop(problem: Problem) -> Call:
    higher = imported("higher")
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
    torchopt = imported("torchopt")
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

    return each_task(problem, params, query_loss)
