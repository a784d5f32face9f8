"""The learned optimizers beyond the contract: torch's own LSTM, in place, long unrolls, odd gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

import metafast
from metafast import reference
from metafast.reference.learned_optimizer import log_sign

SHAPES = ((3, 5, 2, 2), (130,), (), (0,), (64,))  # a convolution's weights, more than a block, nothing


def weights_of(
    hidden: int, layers: int, *, inputs: int = 2, gates: bool = False, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(0.4).to(dtype)

    found = []
    for layer in range(layers):
        found += [normal(4 * hidden, hidden if layer else inputs), normal(4 * hidden, hidden)]
        found += [normal(4 * hidden)]
    top = hidden if layers else inputs
    return [*found, normal(1 + gates, top + 2 * gates), normal(1 + gates)]


def gradients(*leading: int, dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[Tensor]:
    """Of all sizes, from e^-12 to e^4."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(*leading, *shape) for shape in shapes]
    return [
        (
            torch.randn(size, generator=generator, dtype=torch.float64)
            * torch.exp(16 * torch.rand(size, generator=generator, dtype=torch.float64) - 12)
        ).to(dtype)
        for size in sizes
    ]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_a_step_is_torchs_lstm_cells() -> None:
    grads, (first, second, out) = gradients(), (nn.LSTMCell(2, 20), nn.LSTMCell(20, 20), nn.Linear(20, 1))
    for module in (first, second, out):
        module.double()
    weights = []
    for cell in (first, second):
        weights += [cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh]
    weights += [out.weight, out.bias]
    state = metafast.lstm_optimizer_state(grads, hidden=20, layers=2)
    x = log_sign(joined(grads), 10.0)
    h1 = h2 = None
    for _ in range(3):
        updates, state = metafast.lstm_optimizer_step(grads, state, weights, scale=0.3)
        h1 = first(x, h1)
        h2 = second(h1[0], h2)
        assert_close(joined(updates), 0.3 * out(h2[0]).squeeze(1), torch.float64)
    views = metafast.state_views(state, hidden=20, layers=2)
    place = 2  # the second tensor begins behind one block of the first
    assert_close(views.cell[1, 1 : 1 + place].flatten(0, 1)[:64], h2[1][60:124], torch.float64)
    assert views.gates.numel() == 0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hidden", [1, 2, 7, 20, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_unroll_of_any_network(hidden: int, layers: int, dtype: torch.dtype, steps: int) -> None:
    weights = weights_of(hidden, layers, inputs=1 + layers % 2)
    options = {"preprocess": "log_sign" if layers % 2 else "none"}
    assert_unroll(weights, steps, dtype, **options)


def assert_unroll(weights: list[Tensor], steps: int, dtype: torch.dtype, **options: Any) -> None:
    grads = [g.clamp(-3, 3) for g in gradients(steps)]
    layers = len(weights) // 3
    params = gradients()
    state = metafast.lstm_optimizer_state(params, hidden=weights[1].shape[1], layers=layers)
    state = torch.randn(state.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(module: Any, dtype: torch.dtype) -> list[Tensor]:
        w, g, p, (s,) = (
            [t.to(dtype).requires_grad_() for t in group] for group in (weights, grads, params, [state])
        )
        out, new_state = module.lstm_optimizer_unroll(g, s, w, params=p, **options)
        total = sum(t.square().sum() for t in out) + new_state.sin().sum()
        leaves = [*w, *g, *p, s]
        return [*out, new_state, *torch.autograd.grad(total, leaves, materialize_grads=True)]

    expected = run(reference, torch.float64)
    scales = [max(1.0, t.abs().max().item()) if t.numel() else 1.0 for t in expected]
    actual = run(metafast, dtype)
    assert_close(
        [t / s for t, s in zip(actual, scales, strict=True)],
        [t / s for t, s in zip(expected, scales, strict=True)],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_unroll_runs_in_parts(dtype: torch.dtype) -> None:
    assert_unroll(weights_of(20, 2), 60, dtype)


def test_meta_gradient_is_that_of_autograd_through_the_loop() -> None:
    """The gradient dropped but for its own dependence on the weights, as the lecture's and the paper's."""
    weights = [w.requires_grad_() for w in weights_of(20, 2)]
    target = torch.randn(70, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    theta, state, recorded, loss = torch.zeros_like(target), None, [], 0.0
    state = metafast.lstm_optimizer_state([theta], hidden=20, layers=2)
    for _ in range(6):
        grad = (theta - target).detach()
        (theta,), state = reference.lstm_optimizer_step([grad], state, weights, params=[theta])
        loss = loss + (theta - target).square().sum() / 2
    expected = torch.autograd.grad(loss, weights)

    theta = torch.zeros_like(target)
    state = metafast.lstm_optimizer_state([theta], hidden=20, layers=2)
    for _ in range(6):
        recorded.append(theta - target)
        metafast.lstm_optimizer_step_([theta], [recorded[-1]], state, weights)
    recorded.append(theta - target)
    start = metafast.lstm_optimizer_state([theta], hidden=20, layers=2)
    (thetas,), _ = metafast.lstm_optimizer_unroll(
        [torch.stack(recorded[:-1])], start, weights, params=[torch.zeros_like(target)]
    )
    assert_close(torch.autograd.grad(thetas, weights, torch.stack(recorded[1:])), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(dtype: torch.dtype) -> None:
    weights = weights_of(20, 2, dtype=torch.float32)
    grads, params = gradients(dtype=torch.float32), gradients(dtype=torch.float32)
    state = metafast.lstm_optimizer_state(params, hidden=20, layers=2, dtype=dtype)
    expected, new_state = metafast.lstm_optimizer_step(grads, state, weights, params=params)
    # Not dense in memory, and read before it is written.
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    metafast.lstm_optimizer_step_(params, grads, state, weights)
    assert all(map(torch.equal, params, expected))
    assert torch.equal(state, new_state)
    assert state.dtype == dtype
    version = params[1]._version
    metafast.lstm_optimizer_step_(params, grads, state, weights)
    assert params[1]._version > version


@pytest.mark.parametrize("layers", [0, 2])
def test_meta_lstm_in_place(layers: int) -> None:
    weights = weights_of(5, layers, inputs=4, gates=True)
    theta, grads, loss = gradients(), gradients(), torch.tensor(0.3, dtype=torch.float64)
    state = metafast.meta_lstm_state(theta, hidden=5, layers=layers)
    expected, new_state = metafast.meta_lstm_step(theta, grads, loss, state, weights)
    metafast.meta_lstm_step_(theta, grads, loss, state, weights)
    assert all(map(torch.equal, theta, expected))
    assert torch.equal(state, new_state)
    with pytest.raises(ValueError, match=r"loss: expected shape \[\] .*, got \[1\]"):
        metafast.meta_lstm_step_(theta, grads, loss.unsqueeze(0), state, weights)


def test_in_place_has_no_derivative() -> None:
    params, grads = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    state = metafast.lstm_optimizer_state(params, hidden=2, layers=1)
    tensors = (params, grads, None, state, weights_of(2, 1, dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"lstm_optimizer_step_: works in place.*no_grad"):
        torch.ops.metafast.lstm_step_(*tensors, "update", "log_sign", 10.0, 0.1)


def test_bfloat16_state_is_the_rounded_one() -> None:
    weights, grads = weights_of(20, 2, dtype=torch.float32), gradients(7, dtype=torch.float32)
    wide = metafast.lstm_optimizer_state([g[0] for g in grads], hidden=20, layers=2)
    narrow = wide.bfloat16()
    updates, state = metafast.lstm_optimizer_unroll(grads, wide, weights)
    same_updates, half_state = metafast.lstm_optimizer_unroll(grads, narrow, weights)
    assert all(map(torch.equal, updates, same_updates))
    assert torch.equal(half_state, state.bfloat16())
    not_a_number = [torch.full_like(g, torch.nan) for g in grads]
    _, state = metafast.lstm_optimizer_unroll(not_a_number, narrow, weights)
    assert state[0, :, :60].isnan().any()


def test_more_tensors_than_a_launch_takes() -> None:
    weights = [w.requires_grad_() for w in weights_of(5, 1)]
    grads = gradients(2, shapes=[(1 + i % 5,) for i in range(70)])
    state = metafast.lstm_optimizer_state([g[0] for g in grads], hidden=5, layers=1)
    state = torch.randn(state.shape, dtype=state.dtype, generator=torch.Generator().manual_seed(0))

    def run(module: Any) -> list[Tensor]:
        updates, new_state = module.lstm_optimizer_unroll(grads, state, weights)
        found = torch.autograd.grad(joined(updates).square().sum() + new_state.sum(), weights)
        return [*updates, new_state, *found]

    assert_close(run(metafast), run(reference), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_odd_gradients(dtype: torch.dtype) -> None:
    """Zero, denormal, huge and infinite ones give finite inputs; NaN stays in its coordinate."""
    limits = torch.finfo(dtype)
    odd = [0.0, -0.0, limits.smallest_normal / 8, limits.max, -limits.max, torch.inf, -torch.inf, torch.nan]
    grads = torch.tensor([*odd, 1e-3, 4.54e-5, 4.53e-5], dtype=dtype, requires_grad=True)
    weights = [w.requires_grad_() for w in weights_of(20, 2, dtype=dtype)]
    state = metafast.lstm_optimizer_state([grads], hidden=20, layers=2)
    finite = ~torch.tensor([*odd, 1.0, 1.0, 1.0]).isnan()
    (update,), new_state = metafast.lstm_optimizer_step([grads], state, weights)
    (expected,), _ = reference.lstm_optimizer_step(
        [grads.double().clamp(-limits.max, limits.max)], state.double(), [w.double() for w in weights]
    )
    assert torch.equal(update.isfinite(), finite)
    assert_close(update[finite], expected[finite], dtype)
    assert torch.equal(new_state[0, :, : len(grads)].isfinite().all(0), finite)
    (slope,) = torch.autograd.grad(update[finite].sum(), grads)
    (expected_slope,) = torch.autograd.grad(expected[finite].sum(), grads)
    inner = finite & (grads.detach().abs() < limits.max) & (grads.detach().abs() > limits.smallest_normal)
    assert_close(slope[inner], expected_slope[inner], dtype)
    assert (slope[torch.tensor([5, 6])] == 0).all()  # infinite ones count as a constant


@pytest.mark.parametrize("layers", [0, 1])
def test_meta_lstm_with_fixed_gates_is_sgd(layers: int) -> None:
    """f = 1 and i = lr: c_t = f c_{t-1} - i grad is gradient descent."""
    theta, grads, lr = gradients(dtype=torch.float32), gradients(dtype=torch.float32), 0.03
    weights = [torch.zeros_like(w) for w in weights_of(20, layers, inputs=4, gates=True, dtype=torch.float32)]
    weights[-1].copy_(torch.tensor([torch.logit(torch.tensor(lr)), 40.0]))
    state = metafast.meta_lstm_state(theta, hidden=20, layers=layers)
    found, state = metafast.meta_lstm_step(theta, grads, torch.tensor(1.7), state, weights)
    expected, _ = metafast.sgd_update(theta, grads, lr)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    gates = metafast.state_views(state, hidden=20, layers=layers).gates[0, :60]
    torch.testing.assert_close(gates, torch.tensor([lr, 1.0]).expand(60, 2), rtol=1e-6, atol=0)
    assert (gates[:, 1] == 1).all()  # so theta never fades


def test_state_views_write_the_state() -> None:
    params = [torch.zeros(70), torch.zeros(3)]
    state = metafast.meta_lstm_state(params, hidden=4, layers=2)
    views = metafast.state_views(state, hidden=4, layers=2)
    assert [tuple(v.shape) for v in views] == [(2, 3, 64, 4), (2, 3, 64, 4), (3, 64, 2)]
    views.hidden[1, 1, 5, 2] = 1.0  # coordinate 69 of the first tensor
    views.cell[0, 2, 1, 3] = 2.0
    views.gates[0, 7, 1] = 3.0
    assert state.count_nonzero() == 3
    assert (state[1, 8 + 2, 5], state[2, 4 + 3, 1], state[0, 17, 7]) == (1.0, 2.0, 3.0)


def test_no_tensors() -> None:
    state, weights = torch.zeros(0, 40, 64), weights_of(20, 1)
    assert metafast.lstm_optimizer_step([], state, weights)[0] == []
    assert metafast.meta_lstm_step([], [], torch.zeros(()), state, weights)[0] == []
    metafast.lstm_optimizer_step_([], [], state, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": torch.zeros(1, 2 * 19, 64)},
            r"state: expected shape .*= \[1, 40, 64\], got \[1, 38, 64\]",
        ),
        ({"state": torch.zeros(2, 40, 64)}, r"state: .*= \[1, 40, 64\], got \[2, 40, 64\]"),
        ({"weights": weights_of(20, 4)}, "weights: expected .* 1 to 3 layers"),
        ({"weights": weights_of(20, 1, dtype=torch.float32)[:-1]}, "weights: expected W_ih, W_hh, b"),
        ({"params": []}, "params: expected 1 tensors, one for each of grads, got 0"),
        ({"params": [torch.zeros(4)]}, r"params\[0\]: expected shape of its gradient"),
        ({"p": 0.0}, "p: expected a number > 0, at most 88, got 0"),
        ({"p": 100.0}, "p: expected a number > 0, at most 88, got 100"),
        ({"preprocess": "log"}, "preprocess: expected log_sign or none, got log"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    grads = [torch.zeros(3)]
    call = {
        "grads": grads,
        "state": metafast.lstm_optimizer_state(grads, hidden=20, layers=1),
        "weights": weights_of(20, 1, dtype=torch.float32),
    }
    with pytest.raises(ValueError, match=message):
        metafast.lstm_optimizer_step(**{**call, **change})


def test_wrong_theta_is_called_theta() -> None:
    grads, weights = [torch.zeros(1, 3)], weights_of(5, 0, inputs=4, gates=True, dtype=torch.float32)
    state = metafast.meta_lstm_state([torch.zeros(3)], hidden=5, layers=0)
    with pytest.raises(ValueError, match="theta: expected 1 tensors, one for each of grads, got 2"):
        metafast.meta_lstm_unroll([torch.zeros(3)] * 2, grads, torch.zeros(1), state, weights)
    with pytest.raises(ValueError, match=r"theta\[0\]: expected shape of its gradient = \[3\], got \[4\]"):
        metafast.meta_lstm_unroll([torch.zeros(4)], grads, torch.zeros(1), state, weights)


def test_compiled_step_in_place() -> None:
    weights, grads = weights_of(5, 1, dtype=torch.float32), gradients(dtype=torch.float32)
    state = metafast.lstm_optimizer_state(grads, hidden=5, layers=1)
    found, expected = ([[g.clone() for g in grads], state.clone()] for _ in range(2))
    metafast.lstm_optimizer_step_(expected[0], grads, expected[1], weights)
    step = torch.compile(metafast.lstm_optimizer_step_, fullgraph=True, backend="aot_eager")
    step(found[0], grads, found[1], weights)
    assert all(map(torch.equal, found[0], expected[0]))
    assert torch.equal(found[1], expected[1])


def test_wrong_views() -> None:
    with pytest.raises(ValueError, match=r"state: expected shape \[B, R, 64\] with R = 40 or 42"):
        metafast.state_views(torch.zeros(1, 30, 64), hidden=20, layers=1)


def test_same_bits_for_every_number_of_threads() -> None:
    weights = [w.requires_grad_() for w in weights_of(20, 2, dtype=torch.float32)]
    grads = gradients(4, dtype=torch.float32, shapes=[(5000,), (77, 13)])
    state = metafast.lstm_optimizer_state([g[0] for g in grads], hidden=20, layers=2)

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            updates, new_state = metafast.lstm_optimizer_unroll(grads, state, weights)
            return [*updates, new_state, *torch.autograd.grad(joined(updates).sum(), weights)]
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (2, 7):
        assert all(map(torch.equal, run(threads), first))
