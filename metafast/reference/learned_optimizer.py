"""Reference of the learned optimizer family: an LSTM shared by all coordinates that moves parameters.

The functions have the signatures of `metafast.ops.learned_optimizer`, which states the shapes, and can be
differentiated to any order, by autograd and by every transform of ``torch.func``. Under autocast they run in
float32, as the compiled operations do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner_loop import float32_under_autocast

BLOCK = 64  # coordinates of a block of state
MOST_P = 88  # exp(p) is a float32


class StateViews(NamedTuple):
    hidden: Tensor  # [L, B, 64, H]
    cell: Tensor  # [L, B, 64, H]
    gates: Tensor  # [B, 64, 2], the input and the forget gate; [B, 64, 0] without them


def blocks(size: int) -> int:
    """How many blocks of state a tensor of so many elements has."""
    return -(-size // BLOCK)


def state_views(state: Tensor, *, hidden: int, layers: int) -> StateViews:
    rows = state.transpose(1, 2)  # [B, 64, R]
    lstm = rows[..., : 2 * layers * hidden].unflatten(2, (layers, 2, hidden)).permute(2, 3, 0, 1, 4)
    return StateViews(lstm[:, 0], lstm[:, 1], rows[..., 2 * layers * hidden :])


def _unpack(state: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B, R, 64] -> [P, R], the rows of the tensors' coordinates."""
    rows = state.transpose(1, 2).split([blocks(size) for size in sizes])
    return torch.cat([r.flatten(0, 1)[:size] for r, size in zip(rows, sizes, strict=True)])


def _pack(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """[P, R] -> [B, R, 64], 0 behind each tensor's last coordinate."""
    padded = [F.pad(r, (0, 0, 0, -r.shape[0] % BLOCK)) for r in rows.split(list(sizes))]
    return torch.cat(padded).unflatten(0, (-1, BLOCK)).transpose(1, 2)


def log_sign(x: Tensor, p: float) -> Tensor:
    """[...] -> [..., 2]: log(|x|) / p and sign(x) where |x| >= exp(-p), else -1 and exp(p) x."""
    if not 0 < p <= MOST_P:
        raise ValueError(f"p: expected a number > 0, at most {MOST_P}, got {p}")
    exp_p = torch.tensor(p, dtype=x.dtype).exp().item()
    magnitude = x.abs().clamp(max=torch.finfo(x.dtype).max)
    small = magnitude * exp_p < 1
    # where() alone would let the logarithm's infinite slope at 0 into the gradient
    size = torch.where(small, -1.0, torch.where(small, 1.0, magnitude).log() / p)
    return torch.stack((size, torch.where(small, x * exp_p, torch.where(x < 0, -1.0, 1.0).to(x.dtype))), -1)


def _lstm(x: Tensor, state: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Layers of an LSTM: x [P, I], state [P, 2LH], weights [W_ih, W_hh, b, ...] -> h [P, H], new state."""
    parts = []
    for layer in range(len(weights) // 3):
        weight_ih, weight_hh, bias = weights[3 * layer : 3 * layer + 3]
        h, c = state[:, 2 * layer * weight_hh.shape[1] :][:, : 2 * weight_hh.shape[1]].chunk(2, 1)
        i, f, g, o = F.linear(x, weight_ih, bias).add(h @ weight_hh.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        parts += [x, c]
    return x, torch.cat(parts, 1) if parts else state[:, :0]


def _flat(tensors: Sequence[Tensor], steps: int) -> Tensor:
    """Tensors [K, ...], or with K = 1 [...], as one [K, P]."""
    return torch.cat(
        [t.reshape(steps, t.numel() // steps if steps else t.shape[1:].numel()) for t in tensors], 1
    )


def _unflat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """[K, P] as tensors of the shapes of `like` [K, ...]."""
    parts = flat.split([t.shape[1:].numel() for t in like], 1)
    return [part.reshape(t.shape) for part, t in zip(parts, like, strict=True)]


@float32_under_autocast
def unroll(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    losses: Tensor | None,
    state: Tensor,
    weights: Sequence[Tensor],
    head: str,
    preprocess: str,
    p: float,
    scale: float,
    unrolled: bool,
) -> tuple[list[Tensor], Tensor]:
    """What the compiled op computes, for either head (csrc/library.cpp)."""
    if preprocess not in ("log_sign", "none"):
        raise ValueError(f"preprocess: expected log_sign or none, got {preprocess}")
    steps = grads[0].shape[0] if unrolled else 1
    stacked = grads if unrolled else [g.unsqueeze(0) for g in grads]
    sizes = [g.shape[1:].numel() for g in stacked]
    rows = _unpack(state.to(grads[0].dtype), sizes)
    theta = _flat(params, 1)[0] if len(params) else None
    results = []
    for k, g in enumerate(_flat(stacked, steps)):
        x = log_sign(g, p) if preprocess == "log_sign" else g.unsqueeze(1)
        if losses is not None:
            seen = log_sign(losses[k] if unrolled else losses, p)
            x = torch.cat((x, seen.expand(g.shape[0], 2)), 1)
        if head == "update":
            h, rows = _lstm(x, rows, weights[:-2])
            update = scale * F.linear(h, weights[-2], weights[-1])[:, 0]
            theta = None if theta is None else theta + update
            results.append(update if theta is None else theta)
        else:
            theta, rows = _meta_step(theta, g, x, rows, weights)
            results.append(theta)
    found = torch.stack(results) if results else _flat(stacked, steps)
    out = _unflat(found, stacked)
    return [o if unrolled else o[0] for o in out], _pack(rows, sizes).to(state.dtype)


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
    return unroll(grads, params or [], None, state, weights, "update", preprocess, p, scale, True)


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
    return unroll(grads, params or [], None, state, weights, "update", preprocess, p, scale, False)


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
    new, new_state = unroll(grads, params, None, state, weights, "update", preprocess, p, scale, False)
    for param, value in zip(params, new, strict=True):
        param.copy_(value)
    state.copy_(new_state)


def _meta_step(
    theta: Tensor, grad: Tensor, x: Tensor, rows: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """theta, grad [P], the inputs x [P, I], state [P, R] -> the new theta and state."""
    head, bias = weights[-2:]
    lstm, gates = rows[:, :-2], rows[:, -2:]
    h, lstm = _lstm(x, lstm, weights[:-2])
    known = F.linear(torch.cat((h, theta.unsqueeze(1)), 1), head[:, :-1], bias)
    gates = (known + gates * head[:, -1]).sigmoid()  # [P, 2]: i and f
    return gates[:, 1] * theta - gates[:, 0] * grad, torch.cat((lstm, gates), 1)


def meta_lstm_unroll(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    losses: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    p: float = 10.0,
) -> tuple[list[Tensor], Tensor]:
    return unroll(grads, theta, losses, state, weights, "gates", "log_sign", p, 1.0, True)


def meta_lstm_step(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    loss: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *,
    p: float = 10.0,
) -> tuple[list[Tensor], Tensor]:
    return unroll(grads, theta, loss, state, weights, "gates", "log_sign", p, 1.0, False)


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
    new, new_state = meta_lstm_step(theta, grads, loss, state, weights, p=p)
    for parameter, value in zip(theta, new, strict=True):
        parameter.copy_(value)
    state.copy_(new_state)
