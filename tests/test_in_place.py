"""The op that works in place, lstm_step_, in what the contract asks of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import metafast

HIDDEN = 7
# An LSTM optimizer's head, and a meta-LSTM's; each with the inputs of its weights and what its head gives.
HEADS = pytest.mark.parametrize(("head", "inputs", "outputs"), [("update", 2, 1), ("gates", 4, 2)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def arguments(inputs: int, outputs: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Any]:
    """params, grads, with four inputs a loss, state and weights of two layers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).mul(0.5).to(dtype)

    gates = outputs == 2
    weights = []
    for layer in range(2):
        weights += [normal(4 * HIDDEN, HIDDEN if layer else inputs), normal(4 * HIDDEN, HIDDEN)]
        weights += [normal(4 * HIDDEN)]
    weights += [normal(outputs, HIDDEN + 2 * gates), normal(outputs)]
    blocks = sum(-(-size // 64) for size in sizes)
    state = normal(blocks, 4 * HIDDEN + 2 * gates, 64)
    loss = normal() if inputs == 4 else None
    return [[normal(size) for size in sizes], [normal(size) for size in sizes], loss, state, weights]


def options(head: str) -> tuple[str, str, float, float]:
    return head, "log_sign", 10.0, 1.0


def stepped(head: str, args: list[Any]) -> list[Tensor]:
    """What the op makes of copies of its arguments."""
    params, grads, loss, state, weights = args
    params, state = [p.clone() for p in params], state.clone()
    torch.ops.metafast.lstm_step_(params, grads, loss, state, weights, *options(head))
    return [*params, state]


@HEADS
@DTYPES
def test_parity(head: str, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    args = arguments(inputs, outputs, dtype, (130, 0, 1, 64, 33))
    params, grads, loss, state, weights = (
        [t.double() for t in a] if isinstance(a, list) else a if a is None else a.double() for a in args
    )
    out, new_state = metafast.reference.learned_optimizer.unroll(
        grads, params, loss, state, weights, *options(head), False
    )
    found = stepped(head, args)
    used = padded(args[0])
    assert_close(found[:-1], out, dtype)
    assert_close(found[-1].mT[used], new_state.mT[used], dtype)


def padded(params: list[Tensor]) -> Tensor:
    """[B, 64]: which places of the blocks hold a coordinate."""
    parts = [torch.arange(-(-p.numel() // 64) * 64).unflatten(0, (-1, 64)) < p.numel() for p in params]
    return torch.cat(parts)


@HEADS
def test_opcheck(head: str, inputs: int, outputs: int) -> None:
    args = arguments(inputs, outputs, torch.float64, (70, 3))
    torch.library.opcheck(torch.ops.metafast.lstm_step_.default, (*args, *options(head)))


@HEADS
def test_same_bits_for_every_number_of_threads(head: str, inputs: int, outputs: int) -> None:
    args = arguments(inputs, outputs, torch.float32, (5000, 77))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7, 7):
            torch.set_num_threads(threads)
            results.append(stepped(head, args))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@HEADS
def test_wrong_arguments_are_named_and_nothing_changes(head: str, inputs: int, outputs: int) -> None:
    args = arguments(inputs, outputs, torch.float64, (70, 3))
    before = [t.clone() for t in (*args[0], args[3])]
    params = "theta" if head == "gates" else "params"
    # A gradient's shape and its parameter's disagree: the parameter is named.
    names = [params, f"(grads|{params})", "loss", "state", "weights"]

    def wrong(tensor: Tensor) -> tuple[tuple[type[Exception], str, Tensor], ...]:
        return (
            (TypeError, "dtype", tensor.int()),
            (ValueError, "device", tensor.to("meta")),
            (ValueError, "got", torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor.unsqueeze(0)),
        )

    for where, name in enumerate(names):
        if args[where] is None:
            continue
        is_list = isinstance(args[where], list)
        for error, what, value in wrong(args[where][0] if is_list else args[where]):
            changed = [value, *args[where][1:]] if is_list else value
            with pytest.raises(error, match=rf"(?=.*\b{name}\b).*expected.*{what}"):
                torch.ops.metafast.lstm_step_(
                    *(changed if i == where else arg for i, arg in enumerate(args)), *options(head)
                )
    assert all(map(torch.equal, (*args[0], args[3]), before))


@HEADS
def test_elements_that_share_memory_are_refused_and_nothing_changes(
    head: str, inputs: int, outputs: int
) -> None:
    params, grads, loss, state, weights = arguments(inputs, outputs, torch.float32, (70, 3))
    before = [t.clone() for t in (*params, state)]
    name = "theta" if head == "gates" else "params"
    for changed, message in (
        ([[params[0], torch.zeros(1).expand(3)], grads, loss, state, weights], rf"{name}\[1\]"),
        ([params, grads, loss, state[:1].expand_as(state), weights], "state"),
    ):
        with pytest.raises(ValueError, match=f"^{message}: expected a tensor to write to"):
            torch.ops.metafast.lstm_step_(*changed, *options(head))
    assert all(map(torch.equal, (*params, state), before))
