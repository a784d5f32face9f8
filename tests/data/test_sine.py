"""Sine waves are those of the MAML paper, and a pure function of seed and step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metafast.data import Episodes, SineSampler


def fit(episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitude and phase [T] of the waves through all points, by least squares, and the largest residual."""
    x = torch.cat([episodes.support, episodes.query], 1).double()
    y = torch.cat([episodes.support_labels, episodes.query_labels], 1).double()
    basis = torch.cat([x.sin(), x.cos()], -1)
    solution = torch.linalg.lstsq(basis, y).solution  # A sin(x - p) = A cos p sin x - A sin p cos x
    residual = (basis @ solution - y).abs().max()
    cosine, sine = solution[:, 0, 0], -solution[:, 1, 0]
    return torch.hypot(cosine, sine), torch.atan2(sine, cosine), residual


def tensors(episodes: Episodes) -> list[Tensor]:
    return [episodes.support, episodes.support_labels, episodes.query, episodes.query_labels]


def test_waves_are_those_of_the_paper() -> None:
    drawn = SineSampler(shots=10, queries=20, tasks=4000).batch(3)
    assert [tuple(t.shape) for t in tensors(drawn)] == [(4000, 10, 1)] * 2 + [(4000, 20, 1)] * 2
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors(drawn))
    assert drawn.regression
    assert len(drawn) == 4000
    amplitude, phase, residual = fit(drawn)
    assert residual < 1e-5
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, math.pi), (drawn.query.flatten(), -5, 5)):
        assert low - 1e-4 <= values.min() < values.max() <= high + 1e-4
        # a uniform distribution: mean and standard deviation within five standard errors
        deviation = (high - low) / math.sqrt(12)
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation / math.sqrt(len(values))
        assert abs(values.std() / deviation - 1) < 5 / math.sqrt(len(values))
    together = torch.stack([amplitude, phase, drawn.support[:, 0, 0], drawn.support[:, 1, 0]])
    assert (together.corrcoef() - torch.eye(4)).abs().max() < 5 / math.sqrt(4000)


def test_batch_is_a_function_of_seed_and_step() -> None:
    forward = SineSampler(shots=2, queries=3, tasks=4, seed=7)
    steps = [0, 1, 63, 64, 65, 1000]
    expected = [tensors(forward.batch(step)) for step in steps]
    for step, batch in zip(reversed(steps), reversed(expected), strict=True):
        again = tensors(SineSampler(shots=2, queries=3, tasks=4, seed=7).batch(step))
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    other = SineSampler(shots=2, queries=3, tasks=4, seed=8)
    seen = {float(batch[0][0, 0, 0]) for batch in expected}
    seen |= {float(other.batch(step).support[0, 0, 0]) for step in steps}
    assert len(seen) == 2 * len(steps)


def test_a_batch_changed_in_place_changes_no_other() -> None:
    sampler = SineSampler(shots=2, queries=3, tasks=4)
    expected = [[tensor.clone() for tensor in tensors(sampler.batch(step))] for step in (5, 6)]
    for tensor in tensors(sampler.batch(5)):
        tensor.zero_()
    for step, values in zip((5, 6), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, tensors(sampler.batch(step)), strict=True))


@pytest.mark.parametrize("name", ["shots", "queries", "tasks"])
def test_bad_arguments_are_named(name: str) -> None:
    sizes = {"shots": 1, "queries": 1, "tasks": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        SineSampler(**sizes)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        SineSampler(shots=1, queries=1, tasks=1).batch(-1)


def test_regressions_have_no_classes() -> None:
    drawn = SineSampler(shots=1, queries=1, tasks=3).batch(0)
    assert drawn.problem.regression
    assert (drawn.problem.input_shape, drawn.problem.outputs) == ((1,), 1)
    with pytest.raises(ValueError, match="a regression has no classes"):
        _ = drawn.num_classes


def test_take_selects_tasks() -> None:
    drawn = SineSampler(shots=1, queries=2, tasks=4).batch(0)
    for chosen in (torch.tensor([False, True, False, True]), torch.tensor([1, 3]), slice(1, 4, 2)):
        taken = drawn.take(chosen)
        assert all(torch.equal(a, b[1::2]) for a, b in zip(tensors(taken), tensors(drawn), strict=True))
