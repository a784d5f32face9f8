"""Reference of the inner loop family: SGD on each task's copy of an MLP, and the query loss after it.

The functions have the signatures of `metafast.ops.inner_loop`. The inner gradients come from
``torch.func.grad``, so what is returned can be differentiated to any order, by autograd and by every
transform of ``torch.func``.

An MLP is its parameters ``[W1, b1, ..., WL, bL]`` in the layout of ``nn.Linear``, each shared by all tasks
(``W`` [O, I], ``b`` [O]) or of each task ([T, O, I], [T, O]). Inputs are [T, S, D]. Targets are [T, S, O] for
``"mse"``, whose loss is the mean over a task's examples and outputs, and int64 [T, S] for
``"cross_entropy"``, the mean over a task's examples that are not labelled -100. A task without any has the
loss NaN, and no gradient. Under autocast `inner_sgd` and `maml_loss` run in float32, as the compiled
operations do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .labels import IGNORED, checked_labels
from .pairwise import autocast_enabled

LearningRate = float | Tensor | Sequence[Tensor]
Result = TypeVar("Result")

_ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}


def float32_under_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function of float32 tensors under autocast; lists of tensors count as tensors."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs) -> Result:
        args = tuple(map(_listed, args))
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
        if first is None or not autocast_enabled(first):
            return function(*args, **kwargs)

        def cast(value):
            low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
            return value.float() if low else value

        args, kwargs = tree_map(cast, (args, {k: _listed(v) for k, v in kwargs.items()}))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _listed(value):
    """A ParameterList as the list it stands for."""
    return list(value) if isinstance(value, torch.nn.ParameterList) else value


def task_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of each task's own: [T, B, I], [T, O, I], [T, O] -> [T, B, O]."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _mlp(params: Sequence[Tensor], x: Tensor, activation: str) -> Tensor:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected relu, tanh or none, got {activation}")
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        x = _ACTIVATIONS[activation](task_linear(x, weight, bias))
    return task_linear(x, params[-2], params[-1])


def _task_losses(
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    loss: str,
    activation: str,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of each task: params [T, ...], x [T, S, D], y [T, S, O] or [T, S], weights [T, S] -> [T]."""
    if weights is not None:
        x = torch.where((weights != 0).unsqueeze(-1), x, 0)  # so that no NaN of what is left out spreads
    return losses_of(_mlp(params, x, activation), y, loss, weights)


def losses_of(out: Tensor, y: Tensor, loss: str, weights: Tensor | None = None) -> Tensor:
    """The loss of each task: outputs [T, S, O], y [T, S, O] or [T, S], weights [T, S] -> [T]."""
    if loss not in ("mse", "cross_entropy"):
        raise ValueError(f"loss: expected mse or cross_entropy, got {loss}")
    if weights is not None:
        counts = weights != 0
        weights = torch.where(counts, weights, 0)  # whose own gradient is 0
        if loss == "mse":
            losses = (out - torch.where(counts.unsqueeze(-1), y, 0)).square().mean(2)
        else:
            y = torch.where(counts, y, IGNORED)
            losses = F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="none")
            losses = losses.view_as(y)
            weights = weights * (y != IGNORED)
        total = weights.sum(1)
        return torch.where(
            total == 0, torch.nan, (losses * weights).sum(1) / torch.where(total == 0, 1, total)
        )
    if loss == "mse":
        return (out - y).square().mean((1, 2))
    losses = F.cross_entropy(out.mT, y, ignore_index=IGNORED, reduction="none")  # [T, S], 0 where ignored
    valid = (y != IGNORED).sum(1)
    return torch.where(valid > 0, losses.sum(1) / valid.clamp_min(1), torch.nan)


def counting(labels: Tensor, weights: Tensor | None) -> Tensor:
    """The labels, without those that have no weight."""
    return labels if weights is None else torch.where(weights != 0, labels, IGNORED)


def _per_task(params: Sequence[Tensor], tasks: int) -> list[Tensor]:
    shared = [p.dim() == 2 - i % 2 for i, p in enumerate(params)]
    return [p.expand(tasks, *p.shape) if s else p for p, s in zip(params, shared, strict=True)]


def _rate(lr: LearningRate, step: int, layer: int, parameter: int) -> float | Tensor:
    """The learning rate of a parameter of a layer, both by their numbers."""
    if isinstance(lr, Tensor):
        return lr if lr.dim() == 0 else lr[step, layer]
    return lr[parameter] if isinstance(lr, Iterable) else lr


def descend(
    theta: Sequence[Tensor],
    gradient: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
    layers: Sequence[int],
    lr: LearningRate,
    steps: int,
    momentum: float,
    first_order: bool,
) -> list[tuple[Tensor, ...]]:
    """theta_0, ..., theta_K of SGD; `layers` are the numbers of the layers that the parameters are in."""
    theta = tuple(theta)
    thetas = [theta]
    buffers: Sequence[Tensor] | None = None
    for step in range(steps):
        grads = gradient(theta)
        if first_order:
            grads = [g.detach() for g in grads]
        buffers = (
            grads if buffers is None else [momentum * b + g for b, g in zip(buffers, grads, strict=True)]
        )
        rates = (_rate(lr, step, layer, i) for i, layer in enumerate(layers))
        theta = tuple(p - rate * b for p, rate, b in zip(theta, rates, buffers, strict=True))
        thetas.append(theta)
    return thetas


def _trajectory(
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    loss: str,
    lr: LearningRate,
    steps: int,
    activation: str,
    momentum: float,
    first_order: bool,
    weights: Tensor | None = None,
) -> list[tuple[Tensor, ...]]:
    """theta_0, ..., theta_K, each [T, ...]."""
    gradient = torch.func.grad(lambda theta: _task_losses(theta, x, y, loss, activation, weights).sum())
    layers = [i // 2 for i in range(len(params))]
    theta = _per_task(params, x.shape[0])
    return descend(theta, gradient, layers, lr, steps, momentum, first_order)


@float32_under_autocast
def inner_sgd(
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    lr: LearningRate,
    steps: int,
    activation: str = "relu",
    momentum: float = 0.0,
    first_order: bool = False,
    example_weights: Tensor | None = None,
) -> list[Tensor]:
    """Train each task's copy of an MLP by `steps` steps of full-batch SGD.

    theta_{k+1} = theta_k - lr * m_{k+1}, where m_{k+1} = momentum * m_k + grad loss(theta_k) and m_0 = 0, as
    in ``torch.optim.SGD``. With `first_order` the gradients count as constants in the backward (Finn et al.
    2017, section 5.2).

    Args:
        params: ``[W1, b1, ..., WL, bL]``, shared by all tasks or one of each task.
        x: Support inputs, [T, S, D].
        y: Support targets: [T, S, O], or labels [T, S] with cross_entropy.
        loss: ``"mse"`` or ``"cross_entropy"``.
        lr: A number or 0-d tensor; [K, L], a rate for each step and layer (MAML++); or a sequence of tensors,
            one for each parameter and of the shape of one task's parameter (Meta-SGD).
        steps: K.
        activation: Between layers: ``"relu"``, ``"tanh"`` or ``"none"``.
        example_weights: [T, S]. The loss of a task is sum(w * loss of an example) / sum(w); weight 0 leaves
            an example out, whatever it holds.

    Returns:
        The adapted parameters, each [T, ...].
    """
    if loss == "cross_entropy":
        y = checked_labels("y", counting(y, example_weights), params[-1].shape[-1])
    thetas = _trajectory(params, x, y, loss, lr, steps, activation, momentum, first_order, example_weights)
    return list(thetas[-1])


@float32_under_autocast
def maml_loss(
    params: Sequence[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    loss: str,
    lr: LearningRate,
    steps: int,
    activation: str = "relu",
    momentum: float = 0.0,
    first_order: bool = False,
    step_weights: Sequence[float] | Tensor | None = None,
    support_weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The query loss after `inner_sgd` on the support: MAML's objective (Finn et al. 2017, section 2.2).

    Args:
        params: and all arguments not named here: as in `inner_sgd`.
        query_x: Query inputs, [T, Q, D].
        query_y: Query targets: [T, Q, O], or labels [T, Q] with cross_entropy.
        step_weights: [K], the weight of the query loss after each step (MAML++'s multi-step loss). By default
            only the loss after the last step counts, with weight 1.
        support_weights: [T, S], the `example_weights` of the support.
        query_weights: [T, Q], those of the query; the loss of a task without any is NaN.
        reduction: ``"mean"`` over tasks, or ``"none"``.

    Returns:
        A scalar, or [T] with reduction ``"none"``.
    """
    if loss == "cross_entropy":
        classes = params[-1].shape[-1]
        support_y = checked_labels("support_y", counting(support_y, support_weights), classes)
        query_y = checked_labels("query_y", counting(query_y, query_weights), classes)
    thetas = _trajectory(
        params, support_x, support_y, loss, lr, steps, activation, momentum, first_order, support_weights
    )
    if step_weights is None:
        losses = _task_losses(thetas[-1], query_x, query_y, loss, activation, query_weights)
    else:
        losses = sum(
            weight * _task_losses(theta, query_x, query_y, loss, activation, query_weights)
            for weight, theta in zip(step_weights, thetas[1:], strict=True)
        )
    return losses.mean() if reduction == "mean" else losses


def sgd_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: LearningRate,
    *,
    momentum_buffers: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """One differentiable step of ``torch.optim.SGD`` on many tensors, none of them changed in place.

    Args:
        params: Tensors of any shapes.
        grads: Their gradients.
        lr: A number or 0-d tensor, or one tensor for each parameter, broadcast to its shape.
        momentum_buffers: What the previous step returned; by default zeros.

    Returns:
        The new parameters, and the new momentum buffers (none without momentum).
    """
    rates = lr if isinstance(lr, Iterable) and not isinstance(lr, Tensor) else [lr] * len(params)
    new_params, new_buffers = [], []
    for i, (param, grad, rate) in enumerate(zip(params, grads, rates, strict=True)):
        step = grad + weight_decay * param if weight_decay else grad
        if momentum:
            buffer = momentum * momentum_buffers[i] + step if momentum_buffers else step
            new_buffers.append(buffer)
            step = step + momentum * buffer if nesterov else buffer
        new_params.append(param - rate * step)
    return new_params, new_buffers
