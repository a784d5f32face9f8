"""Gradient descent as an LSTM: a cell that all coordinates share proposes what happens to each parameter.

Shapes: P coordinates (elements) of a list of tensors of any shapes, K steps, L LSTM layers of H hidden units,
I inputs, B blocks of state.

`lstm_optimizer_step` is the coordinate-wise LSTM optimizer (Andrychowicz et al. 2016), `meta_lstm_step` the
meta-LSTM whose cell state is the parameters (Ravi & Larochelle 2017). Either takes all tensors in one launch
(32 of them at a time). An LSTM is the list of its weights ``[W_ih, W_hh, b]`` of each layer (W_ih [4H, I],
W_hh [4H, H], b [4H]; gates in torch's order i, f, g, o), then W and b of the head.

The state is packed as the kernels like it, [B, R, 64]: coordinate i of a tensor is place ``i % 64`` of the
tensor's block ``i // 64``, each tensor begins a block of its own, places behind its last coordinate are 0,
and R are the rows of a coordinate: h and c of each layer, and of a meta-LSTM its two gates.
`lstm_optimizer_state` and `meta_lstm_state` make one, `state_views` lets people read and write it. It may be
bfloat16 beside float32 tensors: half the memory and half the traffic, float32 arithmetic.

The unrolls take the gradients of K steps, recorded while the optimizer ran, and differentiate through all of
its steps: the exact gradient of anything that follows from the parameters on the way, but for the gradients'
own dependence on the weights, which Andrychowicz et al. (section 2.1) and Ravi & Larochelle (section 3.4)
drop as well. It is local to a coordinate, so one kernel goes forward and back with all it needs in the cache.
It keeps no activations but runs the steps again from the first state; beyond what the cache holds, states are
kept every few steps, and the steps between run a third time. So memory beside the arguments and results is a
few MiB a thread (on a GPU, a multiprocessor), whatever P, and grows with K by a state of 8 to 32 coordinates
for every few steps.

Ops are differentiable once; a second differentiation raises NotImplementedError, and `metafast.reference`
has it. The steps in place are not differentiable. All work in `torch.compile(fullgraph=True)`, the others in
every transform of `torch.func`: fused under `grad` and `vmap` in any nesting with one `grad`, for weights,
and gradients of weights, that `vmap` shares; beyond (`jvp`, `hessian`, forward-mode AD) the pure-PyTorch twin
in `metafast.reference` runs (`metafast.trace_doors` tells).

CPU and CUDA, float32 and float64; on one device the same bits in every run, on the CPU with any number of
threads. Nonlinearities are within 4e-7 of tanh and sigmoid in float32 on the CPU. On a GPU up to 20 hidden
units in float32 go over the tensor cores, with three TF32 products for one of float32's accuracy, whatever
torch's switches of TF32 say. Under autocast all but the steps in place run in float32, and so is then their
new state. Log-sign preprocessing takes an infinite gradient for the largest finite number. NaN stays in its
coordinate, though the gradient of the weights, a sum over coordinates, is NaN then.

Errors: TypeError for a dtype, ValueError for a shape, a device or an option that does not fit, naming the
argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metafast._dispatch import doors
from metafast._dispatch.unroll_chain import unroll_chain
from metafast.reference import learned_optimizer as reference
from metafast.reference.learned_optimizer import BLOCK, StateViews, blocks


def lstm_optimizer_step(
    grads: Sequence[Tensor],
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    params: Sequence[Tensor] | None = None,
    preprocess: str = "log_sign",
    p: float = 10.0,
    scale: float = 0.1,
) -> tuple[list[Tensor], Tensor]:
    """One step of the coordinate-wise LSTM optimizer (Andrychowicz et al. 2016).

    Args:
        grads: Gradients, of any shapes, float32 or float64.
        state: [B, 2LH, 64], of `lstm_optimizer_state` or of the step before; in the dtype of `grads`, or
            bfloat16 beside float32.
        weights: ``[W_ih, W_hh, b]`` of 1 to 3 layers, then W [1, H] and b [1] of the output; in the dtype of
            `grads`.
        params: What is to be moved, of the shapes of `grads`; by default the updates themselves are returned.
        preprocess: The inputs that stand for a gradient: ``"log_sign"`` (appendix A), I = 2: (log(|g|) / p,
            sign(g)) where |g| >= exp(-p), else (-1, exp(p) g); or ``"none"``, I = 1: the gradient.
        p: As above, > 0 and at most 88, so that exp(p) is a float32.
        scale: The updates are ``scale * (W h + b)``.

    Returns:
        The updates (with `params`: params + updates), each of the shape of its gradient, and the new state.
        Their gradients reach `weights`, `state`, `params` and `grads`.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the result is differentiated twice.

    Equivalent to, for one tensor and one layer, with h and c [P, H] of `state_views`::

        x = log_sign(grad.flatten(), p)                                      # [P, 2]
        i, f, g, o = (x @ W_ih.T + h @ W_hh.T + b).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        (scale * (h @ W.T + b_out)).view_as(grad)
    """
    if not len(grads):
        return [], state  # no tensor says for which device
    return _unroll(grads, params, None, state, weights, "update", preprocess, p, scale, False)


def lstm_optimizer_unroll(
    grads: Sequence[Tensor],
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    params: Sequence[Tensor] | None = None,
    preprocess: str = "log_sign",
    p: float = 10.0,
    scale: float = 0.1,
) -> tuple[list[Tensor], Tensor]:
    """K steps of the coordinate-wise LSTM optimizer, whose gradients are given.

    To train an optimizer, let it run without autograd (`lstm_optimizer_step_`), record the gradients, and
    give
    them to this function: with `params`, the parameters that the optimizer began with, it returns those after
    each step once more, as functions of `weights`. The gradient of the loss at theta_k is what was recorded
    in step k + 1, so ``torch.autograd.backward(thetas, recorded)`` is the meta-gradient.

    Args:
        grads: Each [K, ...].
        state: [B, 2LH, 64], before the first step.
        weights, preprocess, p, scale: As in `lstm_optimizer_step`.
        params: Before the first step, each [...]; by default the updates themselves are returned.

    Returns:
        The updates, or with `params` theta_1, ..., theta_K, each [K, ...], and the state after K steps. Their
        gradients reach `weights`, `state`, `params` and `grads`.

    Raises:
        As `lstm_optimizer_step`.

    Equivalent to::

        thetas = []
        for g in zip(*grads):
            params, state = lstm_optimizer_step(g, state, weights, params=params)
            thetas.append(params)
        [torch.stack(t) for t in zip(*thetas)], state
    """
    if not len(grads):
        return [], state
    return _unroll(grads, params, None, state, weights, "update", preprocess, p, scale, True)


@torch.no_grad()
def lstm_optimizer_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    preprocess: str = "log_sign",
    p: float = 10.0,
    scale: float = 0.1,
) -> None:
    """`lstm_optimizer_step` in place: `params` and `state` become those after the step. Not differentiable.

    Args:
        params: [...] each, changed in place.
        grads: Of their shapes.
        state: [B, 2LH, 64], changed in place.
        weights, preprocess, p, scale: As in `lstm_optimizer_step`.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.

    Equivalent to::

        new, new_state = lstm_optimizer_step(grads, state, weights, params=params)
        for param, value in zip(params, new):
            param.copy_(value)
        state.copy_(new_state)
    """
    if len(params) or len(grads):
        lists = (list(params), list(grads), None, state, list(weights))
        doors.call_in_place("lstm_step_", *lists, "update", preprocess, p, scale)


def meta_lstm_step(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    loss: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    p: float = 10.0,
) -> tuple[list[Tensor], Tensor]:
    """One step of the meta-LSTM: parameters are a cell state, with learned gates (Ravi & Larochelle 2017).

    theta_k = f theta_{k-1} - i grad, the forget gate f and the input gate i of each coordinate the sigmoid of
    a linear function of h, theta_{k-1} and the gate itself in the step before (section 3.2). h comes of an
    LSTM over the log-sign inputs of the gradient and of the loss; without an LSTM layer it is these inputs.

    Args:
        theta: Parameters, of any shapes, float32 or float64.
        grads: Their gradients.
        loss: [], the loss they are of.
        state: [B, 2LH + 2, 64], of `meta_lstm_state` or of the step before.
        weights: ``[W_ih, W_hh, b]`` of 0 to 3 layers, W_ih of the first [4H, 4] (the gradient's size and
            sign, the loss's size and sign), then W [2, H + 2] (without layers [2, 4 + 2]) and b [2]: rows of
            i, f; the last two columns of theta_{k-1} and of the gate before.
        p: Of the log-sign inputs, as in `lstm_optimizer_step`.

    Returns:
        The new theta and the new state. Their gradients reach `theta`, `grads`, `loss`, `state` and
        `weights`.

    Raises:
        As `lstm_optimizer_step`.

    Equivalent to, for one tensor, without layers, with i and f [P] of `state_views`::

        h = torch.cat((log_sign(grad.flatten(), p), log_sign(loss, p).expand(P, 2)), 1)
        i = torch.sigmoid(torch.cat((h, theta.view(P, 1), i.view(P, 1)), 1) @ W[0] + b[0])
        f = torch.sigmoid(torch.cat((h, theta.view(P, 1), f.view(P, 1)), 1) @ W[1] + b[1])
        theta = f.view_as(theta) * theta - i.view_as(theta) * grad
    """
    if not len(theta) and not len(grads):
        return [], state
    return _unroll(grads, theta, loss, state, weights, "gates", "log_sign", p, 1.0, False)


def meta_lstm_unroll(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    losses: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    p: float = 10.0,
) -> tuple[list[Tensor], Tensor]:
    """K steps of the meta-LSTM, whose gradients and losses are given.

    Args:
        theta: Before the first step, each [...].
        grads: Each [K, ...].
        losses: [K].
        state: [B, 2LH + 2, 64], before the first step.
        weights, p: As in `meta_lstm_step`.

    Returns:
        theta_1, ..., theta_K, each [K, ...], and the state after K steps. Their gradients reach `theta`,
        `grads`, `losses`, `state` and `weights`.

    Raises:
        As `lstm_optimizer_step`.

    Equivalent to::

        thetas = []
        for loss, *g in zip(losses, *grads):
            theta, state = meta_lstm_step(theta, g, loss, state, weights)
            thetas.append(theta)
        [torch.stack(t) for t in zip(*thetas)], state
    """
    if not len(theta) and not len(grads):
        return [], state
    return _unroll(grads, theta, losses, state, weights, "gates", "log_sign", p, 1.0, True)


@torch.no_grad()
def meta_lstm_step_(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    loss: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    p: float = 10.0,
) -> None:
    """`meta_lstm_step` in place: `theta` and `state` become those after the step. Not differentiable.

    Args:
        theta: [...] each, changed in place.
        grads: Of their shapes.
        loss: [].
        state: [B, 2LH + 2, 64], changed in place.
        weights, p: As in `meta_lstm_step`.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.

    Equivalent to::

        new, new_state = meta_lstm_step(theta, grads, loss, state, weights)
        for parameter, value in zip(theta, new):
            parameter.copy_(value)
        state.copy_(new_state)
    """
    if len(theta) or len(grads):
        lists = (list(theta), list(grads), loss, state, list(weights))
        doors.call_in_place("lstm_step_", *lists, "gates", "log_sign", p, 1.0)


def lstm_optimizer_state(
    params: Sequence[Tensor], *, hidden: int, layers: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The state before the first step, zeros: [B, 2LH, 64].

    Args:
        params: What is to be moved, or tensors like it.
        hidden, layers: H and L.
        dtype: By default that of `params`; bfloat16 beside float32 parameters halves the memory.
    """
    return _zeros(params, 2 * layers * hidden, dtype)


def meta_lstm_state(
    theta: Sequence[Tensor], *, hidden: int, layers: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The state of a meta-LSTM before the first step, zeros: [B, 2LH + 2, 64].

    Args:
        theta: The parameters, or tensors like them.
        hidden, layers: H and L.
        dtype: By default that of `theta`; or bfloat16 beside float32 parameters.
    """
    return _zeros(theta, 2 * layers * hidden + 2, dtype)


def state_views(state: Tensor, *, hidden: int, layers: int) -> StateViews:
    """A packed state as people think of it; what is written to the views is written to the state.

    Args:
        state: [B, R, 64].
        hidden, layers: H and L.

    Returns:
        ``hidden`` and ``cell`` [L, B, 64, H], ``gates`` [B, 64, 2], the input and the forget gate of a
        meta-LSTM, else [B, 64, 0]. Coordinate i of a tensor that begins at block b is at ``[..., b + i // 64,
        i % 64, :]``.
    """
    rows = 2 * layers * hidden
    if state.dim() != 3 or state.shape[2] != BLOCK or state.shape[1] not in (rows, rows + 2):
        raise ValueError(
            f"state: expected shape [B, R, {BLOCK}] with R = {rows} or {rows + 2} rows of {layers} layers of "
            f"{hidden} hidden units, got {list(state.shape)}"
        )
    return reference.state_views(state, hidden=hidden, layers=layers)


def _zeros(params: Sequence[Tensor], rows: int, dtype: torch.dtype | None) -> Tensor:
    if not len(params):
        raise ValueError("params: expected at least one tensor, got none")
    count = sum(blocks(param.numel()) for param in params)
    return torch.zeros(count, rows, BLOCK, dtype=dtype or params[0].dtype, device=params[0].device)


def _unroll(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    losses: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    head: str,
    *options: str | float | bool,
) -> tuple[list[Tensor], Tensor]:
    if params is not None and len(params) != len(grads):
        name = "theta" if head == "gates" else "params"
        raise ValueError(f"{name}: expected {len(grads)} tensors, one for each of grads, got {len(params)}")
    lists = (list(grads), [] if params is None else list(params), losses, state, list(weights))

    def second_door():
        chain = unroll_chain(len(lists[0]), len(lists[1]), losses is not None, len(lists[4]))
        return chain, lambda op: chain.split(op(*chain.spell(*lists), head, *options))

    return doors.call_listed(
        "lstm_unroll",
        (*lists, head, *options),
        lambda: reference.unroll(*lists, head, *options),
        second_door,
    )
