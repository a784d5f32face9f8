"""MAML and its kin on networks that are no MLP, against loops over tasks in plain PyTorch, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.data import Episodes
from metafast.methods import FOMAML, MAML, Adaptation, MetaSGD, Pretrain, Reptile

LR, WAYS = 0.3, 3


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Sequential:
    """Two blocks, whose batch norm has seen other data."""
    layers: list[nn.Module] = []
    for channels in (1, 4):
        norm = nn.BatchNorm2d(4)
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)
        layers += [nn.Conv2d(channels, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, WAYS))


def episodes() -> Episodes:
    labels = torch.arange(WAYS)
    support, query = (torch.randn(2, WAYS * count, 1, 9, 9) for count in (2, 3))
    ignored = labels.repeat(2, 3)
    ignored[1, 4] = -100
    return Episodes(support, labels.repeat(2, 2), query, ignored)


def forward(
    net: nn.Sequential, weights: dict[str, Tensor], x: Tensor, statistics: list | None = None
) -> tuple[Tensor, list]:
    """The network by hand, its batch norm by the statistics given or else by the batch's; and the batch's."""
    seen = []
    for number, layer in enumerate(net):
        own = {name: weights[f"{number}.{name}"] for name, _ in layer.named_parameters()}
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if statistics is not None:
                mean, var = statistics[len(seen)]
            seen.append((mean, var))
            x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
            x = x * own["weight"][:, None, None] + own["bias"][:, None, None]
        elif isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, own["weight"], own["bias"], padding=1)
        else:
            x = F.linear(x, own["weight"], own["bias"]) if own else layer(x)
    return x, seen


def adapted(
    net: nn.Sequential,
    x: Tensor,
    labels: Tensor,
    rates: list,
    first_order: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> dict:
    """One task's weights after a step of plain SGD for each of ``rates``, which has one for each weight."""
    weights = weights or dict(net.named_parameters())
    for step in rates:
        value = F.cross_entropy(forward(net, weights, x)[0], labels)
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=not first_order)
        moved = zip(weights.items(), step, grads, strict=True)
        weights = {name: weight - rate * grad for (name, weight), rate, grad in moved}
    return weights


def query_outputs(
    net: nn.Sequential, drawn: Episodes, rates: list, *, first_order: bool = False, transductive: bool = True
) -> list[Tensor]:
    outputs = []
    for task in range(len(drawn)):
        support = drawn.support[task]
        weights = adapted(net, support, drawn.support_labels[task], rates, first_order)
        statistics = None if transductive else forward(net, weights, support)[1]
        outputs.append(forward(net, weights, drawn.query[task], statistics)[0])
    return outputs


def query_loss(net: nn.Sequential, drawn: Episodes, rates: list, **how: bool) -> Tensor:
    outputs = query_outputs(net, drawn, rates, **how)
    return torch.stack(list(map(F.cross_entropy, outputs, drawn.query_labels))).mean()


def fixed(net: nn.Module, steps: int) -> list:
    return [[LR] * len(list(net.parameters()))] * steps


def assert_same_gradients(value: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(value, parameters)
    for a, b in zip(got, torch.autograd.grad(expected, parameters, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("path", [None, "torch.func"])
@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("kind", [MAML, FOMAML])
def test_maml_equals_its_definition(kind: type[MAML], transductive: bool, path: str | None) -> None:
    net, drawn = network(), episodes()
    before = copy.deepcopy(net.state_dict())
    method = kind(net, loss="cross_entropy", lr=LR, steps=2, transductive=transductive, path=path)
    how = {"first_order": kind is FOMAML, "transductive": transductive}
    expected = query_loss(net, drawn, fixed(net, 2), **how)
    for mode in (True, False):  # batch norm goes by the task in both
        method.train(mode)
        assert_same_gradients(method.loss(drawn), expected, list(net.parameters()))
        modes = {part.training for part in net.modules()}
        assert modes == {mode}
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_maml_learns_the_rates_of_steps_and_layers() -> None:
    net, drawn = network(), episodes()
    method = MAML(net, loss="cross_entropy", lr=LR, steps=2, learn_lr=True)
    assert method.lr.shape == (2, 5)
    with torch.no_grad():
        method.lr.mul_(torch.rand_like(method.lr))
    expected = query_loss(net, drawn, [row.repeat_interleave(2) for row in method.lr])
    assert_same_gradients(method.loss(drawn), expected, [*net.parameters(), method.lr])
    for steps in (0, 1, 4):
        rates = [method.lr[min(step, 1)].repeat_interleave(2) for step in range(steps)]
        outputs = torch.stack(query_outputs(net, drawn, rates))
        torch.testing.assert_close(method.predict(drawn, steps), outputs.log_softmax(-1))


def test_metasgd_learns_a_rate_for_every_weight() -> None:
    net, drawn = network(), episodes()
    method = MetaSGD(net, loss="cross_entropy", lr=LR, steps=2)
    with torch.no_grad():
        for rate in method.lr:
            rate.mul_(torch.randn_like(rate))  # a learned rate may be negative
    expected = query_loss(net, drawn, [list(method.lr)] * 2)
    assert_same_gradients(method.loss(drawn), expected, [*net.parameters(), *method.lr])


def test_reptile_goes_to_the_mean_of_the_adapted_weights() -> None:
    net, drawn = network(), episodes()
    method = Reptile(net, loss="cross_entropy", lr=LR, steps=2)
    ends = []
    for task in range(len(drawn)):
        x = torch.cat([drawn.support[task], drawn.query[task]])
        labels = torch.cat([drawn.support_labels[task], drawn.query_labels[task]])
        ends.append(adapted(net, x, labels, fixed(net, 2)))
    expected = [
        param.detach() - torch.stack([end[name].detach() for end in ends]).mean(0)
        for name, param in net.named_parameters()
    ]
    got = torch.autograd.grad(method.loss(drawn), list(net.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_reptile_takes_a_batch_at_a_step() -> None:
    """All examples in random order before one comes again; each task its own; as the seed has it."""
    net, drawn = network(), episodes()
    method = Reptile(net, loss="cross_entropy", lr=LR, steps=4, batch=5)
    seen: list[Tensor] = []
    whole = method.adapt_by_batches

    def watched(x: Tensor, labels: Tensor) -> list[Tensor]:
        seen.extend((x, labels))
        return whole(x, labels)

    method.adapt_by_batches = watched
    torch.manual_seed(1)
    loss = method.loss(drawn)
    torch.manual_seed(1)
    assert torch.equal(method.loss(drawn), loss)
    x, labels = seen[:2]
    assert x.shape[:3] == labels.shape == (4, 2, 5)
    for task in range(2):
        own = torch.cat([drawn.support[task], drawn.query[task]])
        first, then = (rows.flatten(1) for rows in (own, x[:, task].flatten(0, 1)))
        places = (then[:, None] == first).all(-1).int().argmax(1)  # of what comes, among the 15
        assert torch.equal(then, first[places])
        assert places[:15].sort().values.tolist() == list(range(15))
        assert len(set(places[15:].tolist())) == 5
        assert torch.equal(
            labels[:, task].flatten(),
            torch.cat([drawn.support_labels[task], drawn.query_labels[task]])[places],
        )
    ends = []
    for task in range(2):
        weights = dict(net.named_parameters())
        for step in range(4):
            weights = adapted(net, x[step, task], labels[step, task], fixed(net, 1), weights=weights)
        ends.append(weights)
    for (name, param), got in zip(
        net.named_parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
    ):
        end = torch.stack([end[name].detach() for end in ends]).mean(0)
        torch.testing.assert_close(got, param.detach() - end, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="batch: expected a number >= 1, got 0"):
        Reptile(net, loss="cross_entropy", lr=LR, steps=4, batch=0)


def test_pretraining_is_one_batch_of_all_tasks_and_fine_tunes_each() -> None:
    net, drawn = network(), episodes()
    method = Pretrain(net, loss="cross_entropy", lr=LR, steps=2)
    x = torch.cat([drawn.support, drawn.query], 1)
    labels = torch.cat([drawn.support_labels, drawn.query_labels], 1)
    out, _ = forward(net, dict(net.named_parameters()), x.flatten(0, 1))
    out = out.unflatten(0, x.shape[:2])
    expected = torch.stack(list(map(F.cross_entropy, out, labels))).mean()
    assert_same_gradients(method.loss(drawn), expected, list(net.parameters()))
    outputs = torch.stack(query_outputs(net, drawn, fixed(net, 2)))
    torch.testing.assert_close(method.eval().predict(drawn), outputs.log_softmax(-1))


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("kind", [MAML, FOMAML, MetaSGD, Reptile, Pretrain])
def test_queries_see_each_other_through_batch_norm_only_where_asked(
    kind: type[Adaptation], transductive: bool
) -> None:
    drawn = episodes()
    method = kind(network(), loss="cross_entropy", lr=LR, steps=1, transductive=transductive).eval()
    alone = Episodes(drawn.support, drawn.support_labels, drawn.query[:, :1], drawn.query_labels[:, :1])
    for steps in (0, 1):
        together = method.predict(drawn, steps)[:, :1]
        assert torch.allclose(method.predict(alone, steps), together, rtol=1e-9) != transductive


def test_a_class_that_a_task_does_not_have_is_not_predicted() -> None:
    drawn = episodes()
    drawn = Episodes(*list(vars(drawn).values())[:4], ways=torch.tensor([2, 3]))
    method = MAML(network(), loss="cross_entropy", lr=LR, steps=1)
    log_probs = method.predict(drawn)
    assert (log_probs[0, :, 2:] == -torch.inf).all()
    assert log_probs[1].isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 9))


def test_what_is_frozen_does_not_adapt() -> None:
    net, drawn = network(), episodes()
    net[0].requires_grad_(False)
    method = MAML(net, loss="cross_entropy", lr=LR, steps=2, learn_lr=True)
    assert method.lr.shape == (2, 4)
    rates = [[0.0] * 2 + [LR] * 8] * 2
    for param in net[0].parameters():
        param.requires_grad_()
    expected = query_loss(net, drawn, rates)
    free = [param for name, param in net.named_parameters() if not name.startswith("0.")]
    net[0].requires_grad_(False)
    assert_same_gradients(method.loss(drawn), expected, free)


def test_regression_by_a_network_that_is_no_mlp() -> None:
    net = nn.Sequential(nn.Linear(1, 6), nn.GELU(), nn.Linear(6, 1))
    drawn = Episodes(*(torch.randn(3, 4, 1) for _ in range(4)))
    method = MAML(net, loss="mse", lr=LR, steps=1)
    losses = []
    for x, y, query, target in zip(
        drawn.support, drawn.support_labels, drawn.query, drawn.query_labels, strict=True
    ):
        weights = dict(net.named_parameters())
        value = F.mse_loss(torch.func.functional_call(net, weights, (x,)), y)
        grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        weights = {name: w - LR * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        losses.append(F.mse_loss(torch.func.functional_call(net, weights, (query,)), target))
    assert_same_gradients(method.loss(drawn), torch.stack(losses).mean(), list(net.parameters()))


def test_arguments_that_do_not_fit_the_network_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    with pytest.raises(ValueError, match=r"path: expected one of fused, torch\.func, loop, got 'vmap'"):
        MAML(net, loss="cross_entropy", lr=LR, steps=1, path="vmap")
    with pytest.raises(TypeError, match="transductive: expected bool, got str"):
        MAML(net, loss="cross_entropy", lr=LR, steps=1, transductive="no")
    drawn = Episodes(*(torch.randn(2, 3, 1) for _ in range(3)), torch.randn(2, 3))
    method = MAML(nn.Sequential(nn.Linear(1, 1), nn.GELU()), loss="mse", lr=LR, steps=1)
    with pytest.raises(ValueError, match=r"labels: expected the shape of the outputs, \[2, 3, 1\]"):
        method.loss(drawn)
