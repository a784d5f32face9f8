"""The methods over the fused operations, against their definitions in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metafast import CoordinatewiseLSTM, MetaLSTM, reference
from metafast.data import Episodes, QuadraticSampler, ScaledSampler, SineSampler
from metafast.methods import (
    FOMAML,
    MAML,
    Adaptation,
    LearnedOptimizer,
    MetaLSTMLearner,
    MetaSGD,
    Pretrain,
    ProtoNet,
    Reptile,
    conv4,
    mlp,
)


def episodes(tasks: int = 3, ways: int = 4, shots: int = 2, queries: int = 3, side: int = 16) -> Episodes:
    """Every class is a fixed image plus a little noise, so that a random embedding already separates them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(tasks, ways, 1, 1, side, side, generator=generator)

    def draw(count: int) -> torch.Tensor:
        noise = torch.rand(tasks, ways, count, 1, side, side, generator=generator)
        return (centres + 0.05 * noise).flatten(1, 2)

    labels = torch.arange(ways)
    return Episodes(
        draw(shots),
        labels.repeat_interleave(shots).repeat(tasks, 1),
        draw(queries),
        labels.repeat_interleave(queries).repeat(tasks, 1),
    )


@pytest.mark.parametrize(("side", "features"), [(28, 64), (16, 64), (33, 256)])
def test_conv4_embeds(side: int, features: int) -> None:
    assert conv4()(torch.rand(2, 1, side, side)).shape == (2, features)


def test_conv4_equals_the_textbook_order_of_layers() -> None:
    network = conv4(3, 8).eval()
    x = expected = torch.rand(5, 3, 32, 32)
    for block in range(4):
        convolution, norm = network[4 * block], network[4 * block + 1]
        expected = nn.functional.max_pool2d(norm(convolution(expected)).relu(), 2)
    torch.testing.assert_close(network(x), expected.flatten(1))


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "cityblock"])
def test_protonet_equals_its_definition(metric: str) -> None:
    drawn = episodes()
    method = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(256, 7)), metric=metric)
    support, query = (method.backbone(x.flatten(0, 1)).view(3, -1, 7) for x in (drawn.support, drawn.query))
    expected = reference.prototypical_log_probs(support, drawn.support_labels, query, 4, metric=metric)
    log_probs = method.predict(drawn)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-5)
    nll = -log_probs.gather(-1, drawn.query_labels.unsqueeze(-1)).mean()
    torch.testing.assert_close(method.loss(drawn), nll, rtol=1e-4, atol=1e-5)


def test_protonet_learns_through_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    drawn = episodes()
    method = ProtoNet(conv4(1, 8))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(drawn)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def waves() -> Episodes:
    return SineSampler(shots=5, queries=3, tasks=4).batch(0)


def drawings() -> Episodes:
    return episodes(side=5)


# The problem's episodes, and a user's own network for it.
PROBLEMS = {
    "mse": (
        waves,
        lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)),
    ),
    "cross_entropy": (drawings, lambda: nn.Sequential(nn.Linear(25, 6), nn.ReLU(), nn.Linear(6, 4))),
}


def adapted(network: nn.Module, x: Tensor, labels: Tensor, loss: str, rates: list) -> dict[str, Tensor]:
    """One task's weights after a step of plain SGD for each of ``rates``, one for each parameter."""
    weights = dict(network.named_parameters())
    for step in rates:
        out = torch.func.functional_call(network, weights, (x.flatten(1),))
        value = getattr(nn.functional, f"{loss}_loss" if loss == "mse" else loss)(out, labels)
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        weights = {
            name: weight - rate * grad
            for (name, weight), rate, grad in zip(weights.items(), step, grads, strict=True)
        }
    return weights


def query_loss(network: nn.Module, drawn: Episodes, loss: str, rates: list) -> Tensor:
    """MAML's objective, a task at a time."""
    losses = []
    for task in range(len(drawn)):
        weights = adapted(network, drawn.support[task], drawn.support_labels[task], loss, rates)
        out = torch.func.functional_call(network, weights, (drawn.query[task].flatten(1),))
        labels = drawn.query_labels[task]
        losses.append(getattr(nn.functional, f"{loss}_loss" if loss == "mse" else loss)(out, labels))
    return torch.stack(losses).mean()


def assert_same_gradients(value: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(value, parameters)
    for a, b in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", PROBLEMS)
@pytest.mark.parametrize("learn_lr", [False, True])
def test_maml_equals_its_definition(loss: str, learn_lr: bool) -> None:
    draw, build = PROBLEMS[loss]
    drawn, network = draw(), build()
    method = MAML(network, loss=loss, lr=0.05, steps=2, learn_lr=learn_lr)
    layers = len(method.params) // 2
    rates = method.lr if learn_lr else torch.full((2, layers), 0.05)
    expected = query_loss(network, drawn, loss, [row.repeat_interleave(2) for row in rates])
    parameters = list(network.parameters()) + ([method.lr] if learn_lr else [])
    assert {id(p) for p in method.parameters()} == {id(p) for p in parameters}
    assert_same_gradients(method.loss(drawn), expected, parameters)


def test_fomaml_takes_the_inner_gradients_as_constants() -> None:
    draw, build = PROBLEMS["mse"]
    drawn, network = draw(), build()
    method = FOMAML(network, loss="mse", lr=0.05, steps=2)
    expected = [torch.zeros_like(p) for p in network.parameters()]
    for task in range(len(drawn)):
        one = drawn.take(slice(task, task + 1))
        ends = adapted(network, one.support[0], one.support_labels[0], "mse", [[0.05] * 6] * 2)
        ends = {name: end.detach().requires_grad_() for name, end in ends.items()}
        out = torch.func.functional_call(network, ends, (one.query[0],))
        grads = torch.autograd.grad(nn.functional.mse_loss(out, one.query_labels[0]), list(ends.values()))
        expected = [e + g / len(drawn) for e, g in zip(expected, grads, strict=True)]
    got = torch.autograd.grad(method.loss(drawn), list(network.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", PROBLEMS)
def test_metasgd_learns_a_rate_for_every_weight(loss: str) -> None:
    draw, build = PROBLEMS[loss]
    drawn, network = draw(), build()
    method = MetaSGD(network, loss=loss, lr=0.05, steps=2)
    with torch.no_grad():
        for rate in method.lr:
            rate.mul_(torch.rand_like(rate))
    expected = query_loss(network, drawn, loss, [list(method.lr)] * 2)
    assert_same_gradients(method.loss(drawn), expected, [*network.parameters(), *method.lr])


@pytest.mark.parametrize("loss", PROBLEMS)
def test_a_step_of_sgd_is_reptiles_own(loss: str) -> None:
    draw, build = PROBLEMS[loss]
    drawn, network = draw(), build()
    method = Reptile(network, loss=loss, lr=0.05, steps=3)
    start = [p.detach().clone() for p in network.parameters()]
    mean = [torch.zeros_like(p) for p in start]
    for task in range(len(drawn)):
        x = torch.cat([drawn.support[task], drawn.query[task]])
        labels = torch.cat([drawn.support_labels[task], drawn.query_labels[task]])
        ends = adapted(network, x, labels, loss, [[0.05] * len(start)] * 3)
        mean = [m + end.detach() / len(drawn) for m, end in zip(mean, ends.values(), strict=True)]
    value = method.loss(drawn)
    value.backward()
    torch.optim.SGD(network.parameters(), lr=0.3).step()
    for parameter, theta, end in zip(network.parameters(), start, mean, strict=True):
        torch.testing.assert_close(parameter, theta + 0.3 * (end - theta), rtol=1e-5, atol=1e-6)
    distance = sum((theta - end).square().sum() for theta, end in zip(start, mean, strict=True)) / 2
    torch.testing.assert_close(value, distance, rtol=1e-3, atol=1e-7)


def test_pretraining_fits_one_network_to_all_tasks() -> None:
    draw, build = PROBLEMS["mse"]
    drawn, network = draw(), build()
    x = torch.cat([drawn.support, drawn.query], 1)
    labels = torch.cat([drawn.support_labels, drawn.query_labels], 1)
    expected = nn.functional.mse_loss(network(x), labels)
    assert_same_gradients(
        Pretrain(network, loss="mse", lr=0.05, steps=2).loss(drawn), expected, list(network.parameters())
    )


@pytest.mark.parametrize("loss", PROBLEMS)
@pytest.mark.parametrize("kind", [MAML, FOMAML, MetaSGD, Reptile, Pretrain])
def test_predict_adapts_each_task_to_its_support(loss: str, kind: type[Adaptation]) -> None:
    draw, build = PROBLEMS[loss]
    drawn, network = draw(), build()
    method = kind(network, loss=loss, lr=0.05, steps=1, test_steps=3)
    for steps in (None, 0, 5):
        predicted = method.predict(drawn) if steps is None else method.predict(drawn, steps)
        rates = [[0.05] * len(method.params)] * (3 if steps is None else steps)
        for task in range(len(drawn)):
            weights = adapted(network, drawn.support[task], drawn.support_labels[task], loss, rates)
            out = torch.func.functional_call(network, weights, (drawn.query[task].flatten(1),))
            out = out if loss == "mse" else out.log_softmax(-1)
            torch.testing.assert_close(predicted[task], out, rtol=1e-4, atol=1e-5)


def test_steps_beyond_the_learned_rates_take_the_last() -> None:
    draw, build = PROBLEMS["mse"]
    method = MAML(build(), loss="mse", lr=0.05, steps=2, learn_lr=True)
    with torch.no_grad():
        method.lr.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]) / 100)
    assert torch.equal(method.rates(2), method.lr)
    assert torch.equal(method.rates(1), method.lr[:1])
    assert torch.equal(method.rates(4), method.lr[[0, 1, 1, 1]])
    assert method.rates(0).shape == (0, 3)
    drawn = draw()
    assert method.predict(drawn, 4).shape == (4, 3, 1)
    torch.testing.assert_close(method.predict(drawn, 0), method.network(drawn.query))


@pytest.mark.parametrize(
    ("network", "activation"),
    [
        (nn.Linear(3, 2), "none"),
        (mlp(3, [4], 2), "relu"),
        (mlp(3, [4, 5], 2, "tanh"), "tanh"),
    ],
)
def test_an_mlp_is_read_as_it_is(network: nn.Module, activation: str) -> None:
    method = MAML(network, loss="mse", lr=0.1, steps=1)
    assert method.activation == activation
    assert all(a is b for a, b in zip(method.params, network.parameters(), strict=True))


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="network: expected a parameter that requires grad, got none"):
        MAML(nn.Sequential(nn.ReLU()), loss="mse", lr=0.1, steps=1)


def test_the_meta_lstm_takes_an_mlp_alone() -> None:
    with pytest.raises(ValueError, match="network: expected an MLP whose layers all adapt"):
        MetaLSTMLearner(nn.Sequential(nn.Conv2d(1, 2, 3)), MetaLSTM(4), loss="mse", steps=1)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation: expected one of relu, tanh, got 'gelu'"):
        mlp(1, [2], 1, "gelu")
    with pytest.raises(ValueError, match=r"hidden\[1\]: expected a number >= 1, got 0"):
        mlp(1, [2, 0], 1)
    with pytest.raises(TypeError, match="hidden: expected Sequence, got int"):
        mlp(1, 40, 1)
    with pytest.raises(ValueError, match="in_channels: expected a number >= 1, got 0"):
        conv4(0)
    with pytest.raises(ValueError, match=r"metric: expected one of sqeuclidean, .*, got 'l3'"):
        ProtoNet(conv4(), metric="l3")
    with pytest.raises(TypeError, match="backbone: expected Module, got function"):
        ProtoNet(lambda x: x.flatten(1))
    with pytest.raises(ValueError, match="steps: expected at least 1, whose rates are learned, got 0"):
        MAML(mlp(1, [2], 1), loss="mse", lr=0.1, steps=0, learn_lr=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": lambda x: x}, TypeError, "network: expected Module, got function"),
        ({"loss": "huber"}, ValueError, "loss: expected one of mse, cross_entropy, got 'huber'"),
        ({"lr": -0.1}, ValueError, "lr: expected a number >= 0, got -0.1"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number >= 0, got nan"),
        ({"lr": [0.1, 0.1]}, TypeError, r"lr: expected a number, got \[0.1, 0.1\]"),
        ({"steps": -1}, ValueError, "steps: expected a number >= 0, got -1"),
        ({"steps": 1.5}, TypeError, r"steps: expected an integer, got 1\.5"),
        ({"test_steps": -1}, ValueError, "test_steps: expected a number >= 0, got -1"),
        ({"test_steps": "5"}, TypeError, "test_steps: expected an integer, got '5'"),
    ],
)
@pytest.mark.parametrize("kind", [MAML, FOMAML, MetaSGD, Reptile, Pretrain])
def test_bad_adaptations(
    kind: type[Adaptation], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        kind(**{"network": mlp(1, [2], 1), "loss": "mse", "lr": 0.1, "steps": 1, **change})


def test_cells_of_another_method_are_refused() -> None:
    with pytest.raises(TypeError, match="cell: expected MetaLSTM, got CoordinatewiseLSTM"):
        MetaLSTMLearner(mlp(1, [2], 1), CoordinatewiseLSTM(4), loss="mse", steps=1)
    with pytest.raises(TypeError, match="cell: expected CoordinatewiseLSTM, got MetaLSTM"):
        LearnedOptimizer(MetaLSTM(4))


@pytest.mark.parametrize("truncation", [2, 3, 6])
@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("objective", ["loss", "log"])
def test_learned_optimizer_equals_its_definition(truncation: int, size: float, objective: str) -> None:
    """Backpropagation through the unrolled optimisation, whose gradients are given, part by part."""
    torch.manual_seed(0)
    cell = CoordinatewiseLSTM(4, scale=0.3)
    problems = QuadraticSampler(tasks=5, steps=6).batch(0)
    if size:
        problems = ScaledSampler(QuadraticSampler(tasks=5, steps=6), size=size).batch(0)
    theta, state, losses = problems.start[0], cell.initial_state(problems.start), []
    for step in range(6):
        if step % truncation == 0:
            theta, state = theta.detach(), state.detach()
        leaf = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(problems.losses([leaf], step).sum(), leaf)
        updates, state = reference.learned_optimizer.lstm_optimizer_step(
            [grad], state, cell.weights, **cell.options
        )
        theta = theta + updates[0]
        losses.append(problems.losses([theta], step + 1))
    expected = (torch.stack(losses).log() if objective == "log" else torch.stack(losses)).mean()
    gradients = torch.autograd.grad(expected, list(cell.parameters()))

    before = [tensor.clone() for tensor in problems.start]
    loss = LearnedOptimizer(cell, truncation=truncation, objective=objective).loss(problems)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for weight, gradient in zip(cell.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before, problems.start))


def test_learned_optimizer_refuses_parts_that_do_not_fit() -> None:
    problems = QuadraticSampler(tasks=1, steps=6).batch(0)
    with pytest.raises(ValueError, match="truncation: expected a divisor of the 6 steps, got 4"):
        LearnedOptimizer(CoordinatewiseLSTM(4), truncation=4).loss(problems)
    with pytest.raises(ValueError, match="truncation: expected a number >= 1, got 0"):
        LearnedOptimizer(CoordinatewiseLSTM(4), truncation=0)
    with pytest.raises(TypeError, match=r"truncation: expected an integer, got 1\.5"):
        LearnedOptimizer(CoordinatewiseLSTM(4), truncation=1.5)
    with pytest.raises(ValueError, match="objective: expected one of"):
        LearnedOptimizer(CoordinatewiseLSTM(4), objective="final")


def test_a_method_follows_the_weights_of_its_module() -> None:
    torch.manual_seed(0)
    build = PROBLEMS["mse"][1]
    method, other = (MAML(build(), loss="mse", lr=0.01, steps=1) for _ in range(2))
    method.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(method.loss(waves()), other.loss(waves()))
    method.network[4] = nn.Linear(5, 1)
    method.loss(waves()).backward()
    assert all(param.grad is not None for param in method.parameters())


def test_layers_without_an_activation_predict() -> None:
    method = MAML(nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1)), loss="mse", lr=0.01, steps=0)
    torch.testing.assert_close(method.predict(waves()), method.network(waves().query))
