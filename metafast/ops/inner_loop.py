"""SGD on many small networks at once, each adapting to its own task, and the gradient back through it.

Shapes: T tasks, S support and Q query examples per task, K steps, L layers, D features, I inputs and O
outputs of a layer. An MLP of 1 to 8 layers is its parameters ``[W1, b1, ..., WL, bL]`` in the layout of
`torch.nn.Linear`, all shared by the tasks (W [O, I], b [O]) or all per task (W [T, O, I], b [T, O]), with
an activation between layers. A label of -100 leaves its example out (torch's `ignore_index`): that is how
tasks of unequal size are padded into one batch.

All steps of all tasks run in one kernel, without an autograd graph. `inner_sgd` and `maml_loss` are
differentiable once, exactly, through all steps: one call and one backward are MAML's second-order
meta-gradient. A second differentiation raises NotImplementedError; `metafast.reference` has it.
`sgd_update` and `task_linear` are differentiable to any order. All work in
`torch.compile(fullgraph=True)` and in every transform of `torch.func`: there `inner_sgd` and `maml_loss` stay
fused under `grad` and `vmap` in any nesting with one `grad`, for learning rates and step weights that `vmap`
shares; beyond (`jvp`, `hessian`, forward-mode AD) the call runs the pure-PyTorch twin in
`metafast.reference`, as `sgd_update` always does there (`metafast.trace_doors` tells).

CPU and CUDA, float32 and float64; on one device the same bits in every run, on the CPU with any number of
threads. Under autocast `inner_sgd` and `maml_loss` run in float32, as distances and losses do: SGD's small
steps would be lost in 16 bits. Outside autocast a 16-bit tensor is an error, as is one in `sgd_update`. On
CUDA nothing waits for the GPU: a label out of range is an assertion there, as in torch's own losses.

Memory of a thread, in sets of one task's parameters (of 2 to 16 tasks', in the lanes of a vector of the CPU,
if the networks are small and many): 1 or 2 to adapt alone; with first order and a given lr up to 4;
else K + 1 and up to 5 more, and K more for a gradient of lr. But where the sets of the steps pass
`get_trajectory_bytes`, about 2 sqrt(K) of them are kept in place of K, and the others recomputed: the same
bits, in more time. Activations are never kept beyond their step. Beside the threads' memory there are the
sums over tasks of up to 64 work items, one set each, if tasks share parameters.

On CUDA a group of 32, 64 or 256 threads takes one task after the other. A task's parameters and activations
live in shared memory for all its steps, or, where they do not fit, with the parameters of the K steps in
scratch memory of the group: as many sets as above, and none is recomputed. There are at most as many groups
as a large GPU can run at once, fewer where their scratch memory would pass 2 GiB.

Wide first layers, such as 784-256, whose elements share a learning rate take a shorter way in `maml_loss`,
exact as well: gradient descent moves W1 within the span of the task's S + Q examples, so their coordinates
[S + Q, O], of all tasks at once, and inner products stand for it, and W1 of no task ever exists. It is taken
where it needs fewer operations, judged by the shapes, and no gradient of the inputs is asked for; it holds
two arrays [T, S + Q, O] for the call.

Errors: TypeError for a dtype, ValueError for a shape, a device, a label or an option that does not fit,
naming the argument. NaN in a task stays in its own loss, parameters and gradients, and reaches gradients that
all tasks share if its loss has a part in what is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metafast import _C
from metafast._dispatch import doors
from metafast._dispatch.arguments import blame, check_not_negative, is_number, kind_of, listed
from metafast._dispatch.task_chains import inner_sgd_chain, maml_loss_chain
from metafast.reference import inner_loop as reference
from metafast.reference.inner_loop import LearningRate


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
    """Trains each task's copy of an MLP with `steps` steps of full-batch SGD: MAML's inner loop.

    theta_{k+1} = theta_k - lr * m_{k+1} with m_{k+1} = momentum * m_k + grad loss(theta_k) and m_0 = 0
    (Finn et al. 2017, algorithm 1, line 6, for momentum 0).

    Args:
        params: ``[W1, b1, ..., WL, bL]``, shared ([O, I], [O]) or per task ([T, O, I], [T, O]), float32 or
            float64; ``network.parameters()`` will do.
        x: [T, S, D], the dtype of `params`.
        y: [T, S, O], the dtype of `params`; with cross_entropy [T, S], int64 in [0, O), or -100.
        loss: ``"mse"``, the mean over a task's examples and outputs, or ``"cross_entropy"``, the mean over
            its examples that are not left out. A task without any is not adapted.
        lr: The learning rate; tensors, which have a gradient, in the dtype of `params`:

            - a number or a tensor []
            - a tensor [K, L]: one for each step and layer (Antoniou et al. 2019, section 4)
            - a sequence of tensors, one for each parameter, of its shape ([O, I], [O], without T): one for
              each element (Meta-SGD, Li et al. 2017, section 3)
        steps: K, from 0 on.
        activation: ``"relu"``, ``"tanh"`` or ``"none"``.
        momentum: As in `torch.optim.SGD`.
        first_order: Whether the backward takes the inner gradients as constants: first-order MAML (Nichol
            et al. 2018, section 2), which keeps no earlier parameters.
        example_weights: [T, S], the dtype of `params`; they may have a gradient. The loss of a task becomes
            sum(w * loss of an example) / sum(w), and a task whose weights add up to 0 is not adapted. Weight
            0 leaves an example out, whatever it holds; that weight has no gradient.

    Returns:
        The adapted parameters, in the order of `params`, each [T, ...]. Their gradients reach `params`,
        `lr`, `x`, a float `y` and `example_weights`.

    Raises:
        ValueError: a shape, device, option or label does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the result is differentiated twice.

    Equivalent to, for one layer, mse and no momentum::

        w, b = (p.expand(T, *p.shape) for p in params)
        for _ in range(steps):
            loss = (x @ w.mT + b.unsqueeze(1) - y).square().mean((1, 2)).sum()
            grads = torch.autograd.grad(loss, (w, b), create_graph=not first_order)
            w, b = (p - lr * g for p, g in zip((w, b), grads))
    """
    check_not_negative(lr=lr, momentum=momentum)
    params = listed("params", params)
    options = _options(loss, steps, activation, momentum, first_order)
    values = tuple(options.values())
    try:
        rates = rates_listed(lr, params, x)
        return doors.call_listed(
            "inner_sgd",
            (params, x, y, rates, example_weights, *values),
            lambda: reference.inner_sgd(params, x, y, lr=lr, example_weights=example_weights, **options),
            lambda: (
                inner_sgd_chain(len(params), len(rates), loss == "cross_entropy"),
                lambda op: list(op(*params, x, y, *rates, example_weights, *values)),
            ),
        )
    except Exception:
        _blame({"x": x, "y": y, "example_weights": example_weights}, params, options)
        raise


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
    """The query loss of networks adapted to their support: MAML's objective (Finn et al. 2017, section 2.2).

    Fused with the adaptation. Its backward is the meta-gradient, exact through all steps. With reduction
    ``"mean"`` the forward finds it on its way, where one is wanted, so that the backward costs a
    multiplication.

    Args:
        params: ``[W1, b1, ..., WL, bL]``, shared ([O, I], [O]) or per task ([T, O, I], [T, O]), float32 or
            float64.
        support_x: [T, S, D], the dtype of `params`.
        support_y: [T, S, O], the dtype of `params`; with cross_entropy [T, S], int64 in [0, O), or -100.
        query_x: [T, Q, D], as `support_x`.
        query_y: [T, Q, O] or [T, Q], as `support_y`.
        loss, lr, steps, activation, momentum, first_order: as in `inner_sgd`.
        step_weights: [K], numbers or tensors [], or a tensor of the dtype of `params`; tensors have a
            gradient. The result is the sum of the query losses after each step, so weighed (MAML++'s
            multi-step loss, Antoniou et al. 2019, section 4); a step of weight 0 is left out. By default the
            loss after the last step alone.
        support_weights, query_weights: [T, S] and [T, Q], as the `example_weights` of `inner_sgd`.
        reduction: ``"mean"`` over tasks (NaN if there are none), or ``"none"``. Of the losses of ``"none"``
            those that diverged can be left out, ``losses[losses.isfinite()].mean()``: a task whose loss gets
            no gradient passes none on, where autograd would make NaN of 0 times infinity. (But examples that
            are not finite themselves do reach the gradient of a wide first layer, in the form above.)

    Returns:
        [], or [T] with reduction ``"none"``, in the dtype of `params`. NaN for a task with no query example
        that is not left out. Its gradients reach `params`, `lr`, all weights, and all of the data that is
        float.

    Raises:
        ValueError: a shape, device, option or label does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the result is differentiated twice.

    Equivalent to, for one layer and mse::

        w, b = inner_sgd(params, support_x, support_y, loss=loss, lr=lr, steps=steps)
        (query_x @ w.mT + b.unsqueeze(1) - query_y).square().mean((1, 2)).mean()
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    check_not_negative(lr=lr, momentum=momentum)
    params, data = listed("params", params), (support_x, support_y, query_x, query_y)
    options = _options(loss, steps, activation, momentum, first_order)
    values = tuple(options.values())
    try:
        step_weights = _step_weights(step_weights, support_x)
        rates = rates_listed(lr, params, support_x)
        weights = step_weights, support_weights, query_weights

        def reduced(op: Callable[..., tuple[Tensor]]) -> Tensor:
            (losses,) = op(*params, *data, *rates, *weights, *values)
            return losses.mean() if reduction == "mean" else losses

        return doors.call_listed(
            "maml_loss",
            (params, *data, rates, *weights, *values, reduction == "mean"),
            lambda: reference.maml_loss(
                params,
                *data,
                lr=lr,
                step_weights=step_weights,
                support_weights=support_weights,
                query_weights=query_weights,
                reduction=reduction,
                **options,
            ),
            lambda: (maml_loss_chain(len(params), len(rates), loss == "cross_entropy"), reduced),
        )
    except Exception:
        _blame(dict(zip(_DATA, (*data, support_weights, query_weights), strict=True)), params, options)
        raise


def maml_value_and_grad(
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
) -> tuple[Tensor, list[Tensor]]:
    """`maml_loss`, the mean over tasks, and its gradient in the parameters: a meta-step without autograd.

    For loops over few small tasks, where recording a call and going back through the record take as long as
    the kernel. Whatever else is to have a gradient (learning rates, a network that makes the inputs) needs
    `maml_loss`.

    Args:
        params, support_x, support_y, query_x, query_y: as in `maml_loss`; they need not require gradients.
        loss, lr, steps, activation, momentum, first_order, step_weights, support_weights, query_weights: as
            in `maml_loss`.

    Returns:
        The loss [], and the gradients in the order and the shapes of `params`. They have no graph; in a
        transform of `torch.func` they can be differentiated like any function of it.

    Raises:
        ValueError, TypeError: as `maml_loss`.

    Equivalent to::

        value = maml_loss(params, support_x, support_y, query_x, query_y, loss=loss, lr=lr, steps=steps)
        value.detach(), list(torch.autograd.grad(value, params))
    """
    check_not_negative(lr=lr, momentum=momentum)
    params, data = listed("params", params), (support_x, support_y, query_x, query_y)
    options = _options(loss, steps, activation, momentum, first_order)
    wanted = [True, *[False] * 8]  # of all that a gradient could be asked of, the parameters
    records = torch.is_grad_enabled()
    try:
        step_weights = _step_weights(step_weights, support_x)
        weights = step_weights, support_weights, query_weights
        rates = rates_listed(lr, params, support_x)
        one = torch.ones((), dtype=support_x.dtype, device=support_x.device)

        def by_transform() -> tuple[Tensor, list[Tensor]]:
            with torch.set_grad_enabled(records):  # else an outer transform would find gradients of zero
                grads, value = torch.func.grad_and_value(
                    lambda leaves: maml_loss(
                        leaves,
                        *data,
                        lr=lr,
                        step_weights=step_weights,
                        support_weights=support_weights,
                        query_weights=query_weights,
                        **options,
                    )
                )(params)
            return value, grads

        with torch.no_grad():
            value, grads = doors.call_listed(
                "maml_loss_backward",
                (one, params, *data, rates, *weights, *options.values(), True, wanted),
                by_transform,
            )
        return value, grads[: len(params)]
    except Exception:
        _blame(dict(zip(_DATA, (*data, support_weights, query_weights), strict=True)), params, options)
        raise


def get_trajectory_bytes() -> int:
    """The most bytes of earlier parameters that a thread of a backward keeps: 32 MiB unless set."""
    return _C.get_trajectory_bytes()


def set_trajectory_bytes(limit: int) -> None:
    """Sets `get_trajectory_bytes` for this process.

    It trades time for memory and changes no result. Only CPU tensors ask for it.

    Args:
        limit: Bytes, from 0 on. Beyond it a thread keeps about 2 sqrt(K) sets of parameters, however large.

    Raises:
        ValueError: `limit` is negative.
    """
    _C.set_trajectory_bytes(limit)


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
    """One differentiable step of `torch.optim.SGD` on many tensors in one launch.

    None of them is changed in place. For inner loops around networks that `inner_sgd` does not know.
    Differentiable to any order, with respect to params, grads, a tensor lr and momentum_buffers.

    Args:
        params: Tensors of any shapes, all float32 or all float64.
        grads: Their gradients, of their shapes.
        lr: A number or a tensor [], or a sequence of tensors, one for each of `params`, that broadcasts to
            it.
        momentum_buffers: What the step before returned; by default zeros.
        momentum, weight_decay, nesterov: As in `torch.optim.SGD` (no dampening); nesterov needs a momentum.

    Returns:
        The new parameters, and the new momentum buffers (an empty list without momentum).

    Raises:
        ValueError: a shape, device, number of tensors or option does not fit.
        TypeError: a dtype does not fit.

    Equivalent to::

        steps = [g + weight_decay * p for p, g in zip(params, grads)]
        buffers = [momentum * m + s for m, s in zip(momentum_buffers, steps)]
        steps = [s + momentum * m for s, m in zip(steps, buffers)] if nesterov else buffers
        [p - lr * s for p, s in zip(params, steps)], buffers
    """
    check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    params, grads = listed("params", params), listed("grads", grads)
    buffers = [] if momentum_buffers is None else listed("momentum_buffers", momentum_buffers)
    try:
        if not params and not grads:
            return [], []  # no tensor says for which device
        like = params[0] if params else grads[0]
        return doors.call_listed(
            "sgd_update",
            (params, grads, rates_listed(lr, params, like), buffers, momentum, weight_decay, nesterov),
            lambda: reference.sgd_update(
                params,
                grads,
                lr,
                momentum_buffers=buffers,
                momentum=momentum,
                weight_decay=weight_decay,
                nesterov=nesterov,
            ),
        )
    except Exception:
        blame(
            lists={"params": params, "grads": grads, "momentum_buffers": buffers},
            numbers={"momentum": momentum, "weight_decay": weight_decay},
            flags={"nesterov": nesterov},
        )
        raise


def task_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of each task's own, for the forward of networks adapted by `inner_sgd`.

    One batched matrix product of torch's library, on CPU and CUDA; under autocast to its dtype, as
    `torch.nn.functional.linear`. Differentiable to any order. On the CPU float16 and bfloat16 are computed in
    float32 and rounded once, forward and backward. On CUDA cuBLAS accumulates them in float32, unless it
    splits a long sum: `torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`, and that of bf16,
    say whether it may then add the parts in 16 bits. Its float32 products are IEEE's, unless
    `torch.backends.cuda.matmul.fp32_precision` (or `allow_tf32`) says TF32.

    Args:
        x: [T, B, I], any float.
        weight: [T, O, I], the dtype of `x`.
        bias: [T, O], the dtype of `x`.

    Returns:
        [T, B, O], in the dtype of `x`.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.

    Equivalent to::

        torch.stack([F.linear(x[t], weight[t], bias[t]) for t in range(T)])
    """
    return doors.call_composed("task_linear", x, weight, bias)


_DATA = ("support_x", "support_y", "query_x", "query_y", "support_weights", "query_weights")


def _options(
    loss: str, steps: int, activation: str, momentum: float, first_order: bool
) -> dict[str, str | int | float | bool]:
    """What inner_sgd and maml_loss have in common, by name and in the order of the ops."""
    return {
        "loss": loss,
        "steps": steps,
        "activation": activation,
        "momentum": momentum,
        "first_order": first_order,
    }


def _step_weights(weights: Sequence[float] | Tensor | None, like: Tensor) -> Tensor | None:
    if weights is None or isinstance(weights, Tensor):
        return weights
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(f"step_weights: expected a sequence of numbers or a tensor, got {kind_of(weights)}")
    weights = list(weights)
    if any(isinstance(weight, Tensor) for weight in weights):
        return torch.stack(
            [torch.as_tensor(weight).to(like.device, _exact_dtype(like)) for weight in weights]
        )
    return torch.tensor(weights, dtype=_exact_dtype(like), device=like.device)


def _exact_dtype(like: Tensor) -> torch.dtype:
    """Of numbers beside a tensor: float32 beside 16-bit ones, which autocast computes in that."""
    return torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype


def _blame(tensors: dict[str, Tensor | None], params: list[Tensor], options: dict[str, Any]) -> None:
    def of(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    tensors = {
        name: tensor for name, tensor in tensors.items() if tensor is not None or "weights" not in name
    }
    strings, flags = of("loss", "activation"), of("first_order")
    blame(tensors, {"params": params}, of("steps"), of("momentum"), strings, flags)


def rates_listed(lr: LearningRate, params: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """lr as the ops take it: one tensor, or one for each parameter."""
    if isinstance(lr, Tensor):
        return [lr]
    if is_number(lr):
        return [torch.full((), lr, dtype=_exact_dtype(like), device=like.device)]
    if isinstance(lr, str) or not isinstance(lr, Iterable):
        raise TypeError(f"lr: expected a number, a tensor or a sequence of tensors, got {kind_of(lr)}")
    rates = list(lr)
    if len(rates) != len(params):
        raise ValueError(f"lr: expected one tensor for each of params, {len(params)}, got {len(rates)}")
    for i, rate in enumerate(rates):
        if not isinstance(rate, Tensor):
            raise TypeError(f"lr[{i}]: expected a tensor, got {kind_of(rate)}")
    return rates
