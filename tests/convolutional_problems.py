"""Problems of convolutional networks, and the plain loop of torch.autograd.grad that they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.reference import ConvBlock

# Relative to the largest element of a tensor, against the plain loop in float64 on the same inputs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

NORMED = {"norm": True, "activation": "relu"}
POOL = {"pool": "max", "pool_kernel": 2, "pool_stride": 2}
LINEAR = ConvBlock(None)
CONV4 = (ConvBlock(3, padding=1, **NORMED, **POOL),) * 4 + (LINEAR,)
STRIDED = (ConvBlock(3, 2, 1, **NORMED),) * 3 + (
    ConvBlock(3, 2, 1, **NORMED, pool="average"),
    LINEAR,
)
SHORT = (ConvBlock(3, padding=1, **NORMED, **POOL), LINEAR)


@dataclass(frozen=True)
class Case:
    network: tuple[ConvBlock, ...] = SHORT
    widths: tuple[int, ...] = (4, 3)  # channels of the blocks' results
    image: tuple[int, int, int] = (2, 6, 5)
    tasks: int = 3
    support: int = 5
    steps: int = 2
    loss: str = "cross_entropy"
    lr: str = "scalar"  # or "step and block", "element", "number"
    per_task: bool = False
    momentum: float = 0.0
    first_order: bool = False
    images: str = "random"  # or "half", whose left halves are 0; "empty", of whose tasks one's all are 0
    dead: bool = False  # whether a ReLU of the first block is 0 everywhere
    ignored: bool = False  # whether labels are left out, of a task all
    weighted: bool = False  # whether examples have weights: some 0, with no target, of a task all; some < 0


@dataclass
class Problem:
    """The tensors of a case; those that can have a gradient have one."""

    network: tuple[ConvBlock, ...]
    params: list[Tensor]
    lr: Any
    x: Tensor
    y: Tensor
    options: dict[str, Any]
    weights: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        rates = self.lr if isinstance(self.lr, list) else [self.lr]
        tensors = (*self.params, *rates, self.x, self.y, self.weights)
        return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Problem:
        """The same numbers."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device)
            return value.detach().to(device, dtype).requires_grad_()

        lr = [leaf(rate) for rate in self.lr] if isinstance(self.lr, list) else leaf(self.lr)
        params = [leaf(p) for p in self.params]
        x, y, weights = map(leaf, (self.x, self.y, self.weights))
        return Problem(self.network, params, lr, x, y, self.options, weights)


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale + shift

    lead = (case.tasks,) if case.per_task else ()
    params: list[Tensor] = []
    maps = case.image
    for block, width in zip(case.network, case.widths, strict=True):
        shape = (width, math.prod(maps)) if block.kernel is None else (width, maps[0], *pair(block.kernel))
        for name in block.parameters:
            if name == "weight":
                params.append(normal(*lead, *shape, scale=math.prod(shape[1:]) ** -0.5))
            else:
                params.append(normal(*lead, width, scale=0.3, shift=float(name == "gamma")))
        maps = (width, *map_size(block, maps[1:]))
    if case.dead:
        params[list(case.network[0].parameters).index("beta")][..., 0] = -100
    x = normal(case.tasks, case.support, *case.image)
    if case.images == "half":
        x[..., : (case.image[2] + 1) // 2] = 0
    elif case.images == "empty":
        x[0] = 0
    if case.loss == "mse":
        y = normal(case.tasks, case.support, case.widths[-1])
    else:
        y = torch.randint(0, case.widths[-1], (case.tasks, case.support), generator=generator)
        if case.ignored:
            y[-1] = -100
            y[0, 0] = -100
    if case.lr == "element":
        lr: Any = [normal(*p.shape[len(lead) :], scale=0.02, shift=0.05) for p in params]
    elif case.lr == "step and block":
        lr = normal(case.steps, len(case.network), scale=0.02, shift=0.05)
    else:
        lr = torch.tensor(0.05) if case.lr == "scalar" else 0.05
    weights = None
    if case.weighted:
        weights = torch.rand(case.tasks, case.support, generator=generator) + 0.2
        weights[:, -1] = -0.1
        weights[0, 0], weights[1] = 0, 0
        y[weights == 0] = 77 if case.loss == "cross_entropy" else torch.nan
    options = {
        "loss": case.loss,
        "steps": case.steps,
        "momentum": case.momentum,
        "first_order": case.first_order,
    }
    return Problem(case.network, params, lr, x, y, options, weights).to(dtype, device)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def map_size(block: ConvBlock, size: Sequence[int]) -> tuple[int, int]:
    """The height and width of a block's result."""
    if block.kernel is None:
        return 1, 1

    def after(size: Sequence[int], kernel: Any, stride: Any, padding: Any) -> tuple[int, ...]:
        numbers = zip(size, pair(kernel), pair(stride), pair(padding), strict=True)
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in numbers)

    size = after(size, block.kernel, block.stride, block.padding)
    if block.pool != "none":
        kernel = size if block.pool_kernel is None else block.pool_kernel
        size = after(size, kernel, block.pool_stride, block.pool_padding)
    return size


def forward(network: Sequence[ConvBlock], params: Sequence[Tensor], x: Tensor, moments: list[Any]) -> Tensor:
    """One task's network in torch's own functions: [S, C, H, W] -> [S, O]; appends means and variances."""
    values: Iterator[Tensor] = iter(params)
    for block in network:
        of = {name: next(values) for name in block.parameters}
        if block.kernel is None:
            x = F.linear(x.flatten(1), of["weight"], of.get("bias"))
        else:
            x = F.conv2d(x, of["weight"], of.get("bias"), block.stride, block.padding)
        if block.norm:
            over = (0, 2, 3)
            moments.append((x.detach().mean(over), x.detach().var(over, correction=0)))
            x = F.batch_norm(x, None, None, of.get("gamma"), of.get("beta"), True, eps=block.eps)
        activate = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}[block.activation]
        size = x.shape[2:] if block.pool_kernel is None else block.pool_kernel
        options = size, block.pool_stride, block.pool_padding
        pools = {"max": F.max_pool2d, "average": F.avg_pool2d}
        pool = (lambda x, p=pools[block.pool], o=options: p(x, *o)) if block.pool != "none" else lambda x: x
        x = activate(pool(x)) if block.pools_first else pool(activate(x))
    return x.flatten(1)


def mean_loss(out: Tensor, y: Tensor, loss: str, weights: Tensor | None) -> Tensor:
    """Of one task: out [S, O], y [S, O] or [S], weights [S]."""
    if weights is None:
        if loss == "mse":
            return F.mse_loss(out, y)
        return F.cross_entropy(out, y, reduction="sum") / (y != -100).sum().clamp_min(1)
    counts = weights != 0
    if loss == "cross_entropy":
        counts = counts & (y != -100)
    if not counts.any():
        return 0 * out.sum()
    out, y, weights = out[counts], y[counts], weights[counts]
    each = (out - y).square().mean(1) if loss == "mse" else F.cross_entropy(out, y, reduction="none")
    return (weights * each).sum() / weights.sum()


def plain(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """The adapted parameters and the statistics, by one task after the other."""
    blocks = [i for i, block in enumerate(problem.network) for _ in block.parameters]
    names = [(block.kernel is None, n) for block in problem.network for n in block.parameters]
    steps, options = problem.options["steps"], problem.options
    ends, statistics = [], []
    for t, (x, y) in enumerate(zip(problem.x, problem.y, strict=True)):
        theta = [
            p[t] if p.dim() > (1 if name != "weight" else 2 if linear else 4) else p
            for p, (linear, name) in zip(problem.params, names, strict=True)
        ]
        momenta: list[Tensor] | None = None
        of_steps = []
        for step in range(steps):
            moments: list[Any] = []
            out = forward(problem.network, theta, x, moments)
            weights = None if problem.weights is None else problem.weights[t]
            loss = mean_loss(out, y, options["loss"], weights)
            grads = torch.autograd.grad(loss, theta, create_graph=not options["first_order"])
            momenta = (
                grads
                if momenta is None
                else [options["momentum"] * m + g for m, g in zip(momenta, grads, strict=True)]
            )
            rates = (
                problem.lr[i]
                if isinstance(problem.lr, list)
                else problem.lr[step, blocks[i]]
                if isinstance(problem.lr, Tensor) and problem.lr.dim()
                else problem.lr
                for i in range(len(theta))
            )
            theta = [p - r * m for p, r, m in zip(theta, rates, momenta, strict=True)]
            empty = x.new_empty(0)
            of_steps.append(torch.stack([torch.cat([empty, *(m[i] for m in moments)]) for i in (0, 1)]))
        ends.append(theta)
        statistics.append(torch.stack(of_steps) if steps else None)
    found = [torch.stack(column) for column in zip(*ends, strict=True)]
    return found, torch.stack(statistics, 2) if steps else problem.x.new_empty(0)


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the outputs, each weighed by its own pattern of numbers."""
    patterns = (torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).view(o.shape) for o in outputs)
    total = sum(
        (out.double() * pattern.to(out.device)).sum() for out, pattern in zip(outputs, patterns, strict=True)
    )
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The gradients of a norm's bias or of what stands before it are 0 but for rounding: a scale for all."""
    floor = max((other.abs().max().item() for other in expected if other.numel()), default=0.0) / 100
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        scale = max(other.abs().max().item() if other.numel() else 0.0, floor)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE[dtype] * scale)


def _with_pools(kind: str, kernel: Any, stride: Any, padding: Any, first: bool) -> tuple[ConvBlock, ...]:
    pool = {"pool": kind, "pool_kernel": kernel, "pool_stride": stride, "pool_padding": padding}
    return ConvBlock(3, padding=1, **NORMED, **pool, pools_first=first), LINEAR


CASES = {
    "short": Case(),
    "a task": Case(tasks=1, momentum=0.9, steps=3),
    "no steps": Case(steps=0),
    "a step": Case(steps=1, momentum=0.5),
    "Conv4": Case(CONV4, (5, 4, 5, 4, 3), (1, 17, 16), support=4),
    "strided": Case(STRIDED, (5, 4, 5, 4, 3), (1, 28, 27), support=4),
    "per task": Case(per_task=True, momentum=0.3),
    "step and block": Case(lr="step and block", momentum=0.7, steps=3),
    "element": Case(lr="element", per_task=True),
    "number": Case(lr="number", loss="mse"),
    "first order": Case(first_order=True, momentum=0.4, lr="step and block"),
    "first order, element": Case(first_order=True, lr="element", loss="mse", per_task=True),
    "mse": Case(loss="mse", lr="element", momentum=0.6),
    "left out": Case(ignored=True, support=4),
    "an example a class": Case(support=3, image=(1, 7, 5)),
    "no examples": Case((ConvBlock(3, padding=1, activation="relu", **POOL), LINEAR), support=0),
    "zeros": Case(images="half"),
    "zeros, pooled first": Case(_with_pools("max", 2, 2, 0, True), images="half", steps=3),
    "constant channels": Case((ConvBlock(3, **NORMED), LINEAR), images="empty"),
    "dead": Case(dead=True, steps=3),
    "odd": Case(CONV4[:2] + CONV4[-1:], (6, 7, 3), (1, 13, 9)),
    "kernels": Case(
        (ConvBlock(1, **NORMED), ConvBlock(5, 1, 2, **NORMED), ConvBlock((3, 1), (1, 2)), LINEAR),
        (17, 3, 4, 2),
        (1, 7, 5),
        support=3,
    ),
    "strides": Case((ConvBlock((2, 4), (1, 3), (1, 0), **NORMED), LINEAR), (5, 4), (2, 5, 11)),
    "wide stride": Case((ConvBlock(2, 3, activation="tanh"), LINEAR), (5, 4), (2, 11, 9)),
    "tanh": Case((ConvBlock(3, norm=True, activation="tanh", **POOL), LINEAR), loss="mse"),
    "no norm": Case((ConvBlock(3, padding=1, activation="relu", **POOL), LINEAR), images="half"),
    "no bias": Case((ConvBlock(3, padding=1, bias=False, **NORMED, **POOL), ConvBlock(None, bias=False))),
    "not affine": Case((ConvBlock(3, norm=True, affine=False, eps=1e-3, activation="relu"), LINEAR)),
    "linear alone": Case((ConvBlock(3), LINEAR)),
    "two linear": Case(
        (*SHORT[:1], ConvBlock(None, activation="relu"), ConvBlock(None), LINEAR), (4, 7, 5, 3), loss="mse"
    ),
    "overlapping": Case(_with_pools("max", 3, 2, 1, False), image=(1, 9, 7), images="half"),
    "averages": Case(_with_pools("average", (2, 3), (2, 1), (1, 0), True)),
    "averages of all": Case(_with_pools("average", None, 1, 0, False), image=(1, 7, 5)),
    "gaps": Case(_with_pools("max", 2, 3, 0, False), image=(1, 9, 8)),
}
WEIGHTED = {
    "labels": Case(weighted=True, steps=3),
    "momentum": Case(weighted=True, lr="element", momentum=0.6, per_task=True),
    "mse": Case(weighted=True, loss="mse", momentum=0.3),
    "left out": Case(weighted=True, ignored=True, support=4),
    "an example a class": Case(weighted=True, support=3, image=(1, 7, 5)),
    "first order": Case(weighted=True, first_order=True, lr="step and block"),
    "no norm": Case(
        (ConvBlock(3, padding=1, activation="tanh", **POOL), LINEAR), (4, 40), weighted=True, loss="mse"
    ),
    "many examples": Case(weighted=True, widths=(4, 35), support=37),
}
CASES |= {f"{name}, K=3": replace(CASES[name], steps=3) for name in ("Conv4", "strided", "per task")}
LARGE = Case(CONV4, (64, 64, 64, 64, 5), (3, 84, 84), tasks=2, support=5, steps=1)
