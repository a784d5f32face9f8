"""A meta-step with the libraries for it, task by task, as their users call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inner_loop.peers.libraries import imported, learn2learn_maml
from bench.networks.peers.pytorch import Result
from bench.networks.workloads import LEARNING_RATE, Problem


def learn2learn(problem: Problem) -> Callable[[], Result]:
    maml = learn2learn_maml()(problem.module, lr=LEARNING_RATE)

    @sdpa_kernel(SDPBackend.MATH)
    def call() -> Result:
        losses = []
        for x, y, query_x, query_y in zip(*problem.data, strict=True):
            learner = maml.clone()
            for _ in range(problem.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            losses.append(F.cross_entropy(learner(query_x), query_y))
        loss = torch.stack(losses).mean()
        return loss, *torch.autograd.grad(loss, problem.parameters)

    return call


def higher(problem: Problem) -> Callable[[], Result]:
    package, module = imported("higher"), problem.module
    optimizer = torch.optim.SGD(problem.parameters, lr=LEARNING_RATE)

    @sdpa_kernel(SDPBackend.MATH)
    def call() -> Result:
        results = []
        for x, y, query_x, query_y in zip(*problem.data, strict=True):
            with package.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (functional, inner):
                for _ in range(problem.steps):
                    inner.step(F.cross_entropy(functional(x), y))
                loss = F.cross_entropy(functional(query_x), query_y)
                results.append((loss.detach(), *torch.autograd.grad(loss, problem.parameters)))
        return tuple(torch.stack(column).mean(0) for column in zip(*results, strict=True))

    return call


def torchopt(problem: Problem) -> Callable[[], Result]:
    package, module, parameters = imported("torchopt"), problem.module, problem.parameters
    optimizer = package.MetaSGD(module, lr=LEARNING_RATE)
    states = [(part, package.extract_state_dict(part, by="reference")) for part in (module, optimizer)]

    @sdpa_kernel(SDPBackend.MATH)
    def call() -> Result:
        results = []
        for x, y, query_x, query_y in zip(*problem.data, strict=True):
            for _ in range(problem.steps):
                optimizer.step(F.cross_entropy(module(x), y))
            loss = F.cross_entropy(module(query_x), query_y)
            for part, state in states:
                package.recover_state_dict(part, state)
            results.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
        return tuple(torch.stack(column).mean(0) for column in zip(*results, strict=True))

    return call
