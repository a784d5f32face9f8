"""The problems that learned optimizers learn on: as defined, and a pure function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.data import ImageClasses, Optimizees, QuadraticSampler, ScaledSampler, TrainingSampler
from metafast.data.networks import Network, elman_rnn, relu_cnn, sigmoid_mlp


def classes(count: int = 4, examples: int = 6) -> ImageClasses:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, examples, 1, 8, 8, generator=generator)
    return ImageClasses(images, tuple(map(str, range(count))))


def trainings(seed: int = 0, **changes) -> TrainingSampler:
    settings = {"tasks": 3, "steps": 5, "batch_size": 7, "seed": seed, **changes}
    return TrainingSampler(sigmoid_mlp(64, [5], 4), classes(), **settings)


def quadratics(seed: int = 0, **changes) -> QuadraticSampler:
    return QuadraticSampler(**{"tasks": 3, "steps": 5, "seed": seed, **changes})


def scaled(seed: int = 0) -> ScaledSampler:
    return ScaledSampler(trainings(seed), size=1.5, seed=seed)


def tensors(problems: Optimizees) -> list[Tensor]:
    losses = [problems.losses(problems.start, step) for step in range(problems.steps + 1)]
    return [*problems.start, *losses, problems.objective(problems.start)]


def test_quadratics_are_those_of_the_paper() -> None:
    drawn = quadratics(tasks=2000).batch(1)
    assert [tuple(tensor.shape) for tensor in drawn.start] == [(2000, 10)]
    assert drawn.start[0].dtype == torch.float32
    for values, deviation in ((drawn.matrix, 1.0), (drawn.target, 1.0), (drawn.start[0], 0.01)):
        bound = 5 * deviation / math.sqrt(values.numel())
        assert abs(values.mean()) < bound
        assert abs(values.std() - deviation) < bound
        assert abs((values / deviation).pow(4).mean() - 3) < 5 * math.sqrt(96 / values.numel())  # normal
    theta = torch.randn(2000, 10)
    problems = zip(drawn.matrix, theta, drawn.target, strict=True)
    expected = torch.stack([(w @ t - y).square().sum() for w, t, y in problems])
    torch.testing.assert_close(drawn.losses([theta], 3), expected)
    torch.testing.assert_close(drawn.objective([theta]), expected)


def torch_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))


def torch_cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10))


class TorchRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 6, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


@pytest.mark.parametrize(
    ("network", "module"),
    [
        (sigmoid_mlp(64, [20], 10), torch_mlp),
        (relu_cnn(8, [4, 6], 10), torch_cnn),
        (elman_rnn(8, 6, 10), TorchRNN),
    ],
)
def test_networks_are_torchs(network: Network, module: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    modules = [module() for _ in range(3)]
    x = torch.rand(3, 5, 1, 8, 8)
    expected = torch.stack([model(images) for model, images in zip(modules, x, strict=True)])
    params = [torch.stack(group) for group in zip(*(list(m.parameters()) for m in modules), strict=True)]
    if module is TorchRNN:
        params[2] = params[2] + params.pop(3)  # nn.RNN adds two biases
    assert [tensor.shape[1:] for tensor in params] == [shape for shape, _ in network.parameters]
    torch.testing.assert_close(network(params, x), expected)
    for tensor, (_, bound) in zip(params, network.parameters, strict=True):
        largest = float(tensor.detach().abs().max())
        assert largest < bound * (2 if module is TorchRNN else 1)
        assert largest > 0.6 * bound  # torch's own initialisation has the same bound


def test_trainings_are_losses_on_their_minibatches() -> None:
    sampler = trainings(tasks=200)
    drawn = sampler.batch(2)
    for tensor, (shape, bound) in zip(drawn.start, sampler.network.parameters, strict=True):
        assert tuple(tensor.shape) == (200, *shape)
        assert 0.98 * bound < tensor.abs().max() < bound
        assert abs(tensor.mean()) < 5 * bound / math.sqrt(3 * tensor.numel())
    assert drawn.rows.shape == (6, 200, 7)
    share = drawn.rows.flatten().bincount(minlength=24) / drawn.rows.numel()
    assert (share - 1 / 24).abs().max() < 5 * math.sqrt(1 / 24 / drawn.rows.numel())
    assert torch.equal(drawn.labels, torch.arange(4).repeat_interleave(6))

    for task in (0, 7):
        weight, bias, head, head_bias = (tensor[task] for tensor in drawn.start)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            hidden = F.linear(images.flatten(1), weight, bias).sigmoid()  # noqa: B023 (called in its turn)
            return F.cross_entropy(F.linear(hidden, head, head_bias), labels)  # noqa: B023

        rows = drawn.rows[4, task]
        expected = loss(drawn.images[rows], drawn.labels[rows])
        torch.testing.assert_close(drawn.losses(drawn.start, 4)[task], expected)
        torch.testing.assert_close(drawn.objective(drawn.start)[task], loss(drawn.images, drawn.labels))


def test_padding_is_not_trained_on() -> None:
    ragged = ImageClasses(classes().images, ("a", "b", "c", "d"), torch.tensor([6, 1, 0, 4]))
    drawn = TrainingSampler(sigmoid_mlp(64, [], 4), ragged, tasks=1, steps=1).batch(0)
    assert drawn.labels.tolist() == [0] * 6 + [1] + [3] * 4
    assert torch.equal(drawn.images[6], ragged.images[1, 0])


def test_classes_are_drawn_anew_for_every_batch() -> None:
    sampler = trainings(ways=2)
    seen = set()
    for step in range(100):
        drawn = sampler.batch(step)
        assert torch.equal(drawn.labels, torch.arange(2).repeat_interleave(6))
        pairs = drawn.images.unflatten(0, (2, 6))
        seen.add(tuple(int(c) for p in pairs for c in range(4) if torch.equal(p, sampler.classes.images[c])))
    assert seen == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_scaled_problems_are_the_same_in_other_units() -> None:
    drawn, plain = scaled().batch(2), trainings().batch(2)
    logarithms = torch.cat([scale.log().flatten() for scale in drawn.scales])
    assert -1.5 < logarithms.min() < -1.4
    assert 1.4 < logarithms.max() < 1.5
    assert abs(logarithms.mean()) < 5 * 1.5 / math.sqrt(3 * logarithms.numel())
    params = [tensor + 0.1 for tensor in plain.start]
    units = [tensor / scale for tensor, scale in zip(params, drawn.scales, strict=True)]
    for step in (0, 5):
        torch.testing.assert_close(drawn.losses(units, step), plain.losses(params, step))
        torch.testing.assert_close(drawn.losses(drawn.start, step), plain.losses(plain.start, step))
    torch.testing.assert_close(drawn.objective(units), plain.objective(params))


@pytest.mark.parametrize("kind", [quadratics, trainings, scaled])
def test_batch_is_a_function_of_seed_and_step(kind: Callable) -> None:
    sampler = kind(7)
    expected = {step: tensors(sampler.batch(step)) for step in (0, 1, 1000)}
    for step in (1000, 0, 1):
        assert all(map(torch.equal, tensors(kind(7).batch(step)), expected[step]))
    seen = {float(drawn[0].flatten()[0]) for drawn in expected.values()}
    seen |= {float(kind(8).batch(step).start[0].flatten()[0]) for step in expected}
    assert len(seen) == 6


@pytest.mark.parametrize("kind", [quadratics, trainings, scaled])
@pytest.mark.parametrize("tasks", [slice(1, 2), torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_take(kind: Callable, tasks: slice | Tensor) -> None:
    drawn = kind().batch(0)
    some = drawn.take(tasks)
    assert len(drawn) == 3
    assert len(some) == len(torch.arange(3)[tasks])
    for part, whole in zip(tensors(some), tensors(drawn), strict=True):
        torch.testing.assert_close(part, whole[tasks])


def test_more_steps_change_neither_start_nor_first_minibatches() -> None:
    short, long = trainings(steps=2).batch(3), trainings(steps=9).batch(3)
    assert all(map(torch.equal, short.start, long.start))
    assert torch.equal(short.rows, long.rows[:3])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (quadratics, {"tasks": 0}, "tasks: expected at least 1, got 0"),
        (quadratics, {"steps": 0}, "steps: expected at least 1, got 0"),
        (trainings, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (trainings, {"ways": 5}, "ways: expected 1 to 4, the number of classes, got 5"),
    ],
)
def test_bad_sizes_are_named(kind: Callable, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)
    with pytest.raises(ValueError, match="size: expected a number >= 0, got -1"):
        ScaledSampler(quadratics(), size=-1)
