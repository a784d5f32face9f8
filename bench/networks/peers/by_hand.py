"""A meta-step of Conv4 by hand: convolutions of all tasks as products of patches, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.cases import Skip
from bench.networks.peers.pytorch import Result
from bench.networks.workloads import LEARNING_RATE, Problem


def unfold(problem: Problem) -> Callable[[], Result]:
    """What one writes without a layer that has weights for each task: unfold, then bmm over tasks."""
    if not problem.is_conv4:
        raise Skip("written for Conv4")
    x, y, query_x, query_y = problem.data
    tasks = problem.tasks

    def call() -> Result:
        theta: Sequence[Tensor] = [p.expand(tasks, *p.shape) for p in problem.parameters]
        for _ in range(problem.steps):
            loss = tasks * _loss(theta, x, y)
            grads = torch.autograd.grad(loss, theta, create_graph=True)
            theta = [p - LEARNING_RATE * g for p, g in zip(theta, grads, strict=True)]
        loss = _loss(theta, query_x, query_y)
        return loss, *torch.autograd.grad(loss, problem.parameters)

    return call


def _loss(theta: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The mean over tasks, of parameters [T, ...] and images [T, B, C, H, W]."""
    tasks, count, *_ = x.shape
    maps = x.flatten(0, 1)
    for weight, gamma, beta in zip(theta[:-2:3], theta[1:-2:3], theta[2:-2:3], strict=True):
        height, width = maps.shape[-2:]
        patches = F.unfold(maps, 3, padding=1).unflatten(0, (tasks, count))  # [T, B, 9 C, H W]
        columns = patches.transpose(1, 2).flatten(2)
        z = torch.bmm(weight.flatten(2), columns)
        variance, mean = torch.var_mean(z, 2, keepdim=True, correction=0)
        normed = (z - mean) * torch.rsqrt(variance + 1e-5) * gamma.unsqueeze(2) + beta.unsqueeze(2)
        images = normed.relu().unflatten(2, (count, height, width)).transpose(1, 2).flatten(0, 1)
        maps = F.max_pool2d(images, 2)
    features = maps.flatten(1).unflatten(0, (tasks, count))
    out = torch.baddbmm(theta[-1].unsqueeze(1), features, theta[-2].transpose(1, 2))
    return F.cross_entropy(out.flatten(0, 1), y.flatten())
