"""A meta-step with learn2learn, task by task, as its users call it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inner_loop.peers.libraries import learn2learn_maml
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
