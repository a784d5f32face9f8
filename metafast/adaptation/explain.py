"""`explain`: which path `adapt` takes for a module, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from metafast.adaptation.adapt import adapt
from metafast.adaptation.examples import Examples, at, leaves_of
from metafast.adaptation.inner_loop import InnerLoop, Loss
from metafast.adaptation.path import plan

_HOW = {
    "torch.func": "vmap(grad(functional_call)) over tasks",
    "loop": "torch.autograd.grad, one task after the other",
}


@dataclass(frozen=True)
class Explanation:
    """Which path `adapt` takes for a module, and why. Printing it gives a few lines."""

    path: str  # "fused", "torch.func" or "loop"
    how: str  # what runs
    reason: str
    adapts: dict[str, tuple[int, ...]]  # the names and shapes of the parameters that each task has its own of
    shares: tuple[str, ...]  # the names of those that all tasks share
    refused: dict[str, str] = field(default_factory=dict)  # by the paths that were tried in vain, why

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.how}; {self.reason}"]
        lines += [f"  not {path}: {why}" for path, why in self.refused.items()]
        lines += [f"  adapts {name} {list(shape)}" for name, shape in self.adapts.items()]
        lines += [f"  shares {name}" for name in self.shares]
        return "\n".join(lines)


def explain(
    module: nn.Module,
    x: Examples | None = None,
    *,
    loss: Loss = "cross_entropy",
    weight_decay: float = 0.0,
    nesterov: bool = False,
    params: str | Iterable[str] | None = None,
) -> Explanation:
    """Which path `adapt` takes for a module and these options, why, and what adapts.

    Args:
        module, loss, weight_decay, nesterov, params: as for `adapt`.
        x: [T, S, ...], what `adapt` is to have. With it, "torch.func" and "loop" are tried: a step and its
            derivative on two tasks, with the squares of the outputs as loss. Without it, what the first
            Linear has is taken to be [T, S, D], and what the first Conv2d has [T, S, C, H, W].

    Example::

        >>> print(metafast.explain(nn.Sequential(nn.Flatten(), nn.Linear(784, 5))))
        fused: metafast.inner_sgd; the kernels know Linear 784-5, behind what does not adapt (Flatten)
          adapts 1.weight [5, 784]
          adapts 1.bias [5]
    """
    inner = InnerLoop(loss=loss, weight_decay=weight_decay, nesterov=nesterov)
    with torch.no_grad():
        found = plan(module, inner, params, None, x)
    path, reason, refused = found.path, found.reason or f"the kernels know {found.known}", {}
    how = f"metafast.{found.known.op}" if found.known is not None else _HOW[path]
    if path != "fused" and x is not None:
        for tried in ("torch.func", "loop"):
            if (why := _tried(module, x, params, tried)) is not None:
                refused[tried] = why
        if path in refused and len(refused) == 1:
            reason += f"; but that does not take it: path={({'torch.func', 'loop'} - {path}).pop()!r}"
    shares = tuple(name for name, _ in module.named_parameters() if name not in found.params)
    adapts = {name: tuple(p.shape) for name, p in found.params.items()}
    return Explanation(path, how, reason, adapts, shares, refused)


def _tried(module: nn.Module, x: Examples, params: str | Iterable[str] | None, path: str) -> str | None:
    """Why the path does not take the module."""

    def squares(out: object, y: object) -> torch.Tensor:
        return sum(leaf.float().square().mean() for leaf in leaves_of(out) if leaf.is_floating_point())

    two = at(x, slice(2))
    try:
        with torch.enable_grad():
            adapted = adapt(module, two, two, loss=squares, lr=1e-3, steps=1, params=params, path=path)
            torch.autograd.grad(squares(adapted(two), None), list(module.parameters()), allow_unused=True)
    except Exception as error:
        return str(error).partition("\n")[0]
    return None
