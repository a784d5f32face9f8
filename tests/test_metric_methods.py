"""Methods that compare embeddings, against their definitions in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_methods import episodes
from torch import Tensor, nn

from metafast.data import Episodes, GaussianSampler
from metafast.methods import (
    ConvRelation,
    FullContext,
    Hallucinator,
    ImaginaryData,
    LinearRelation,
    MatchingNet,
    MetricLearner,
    ProtoNet,
    RelationNet,
    Siamese,
    conv4,
)

D = 7


def backbone() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, D))


METHODS: dict[str, Callable[[], MetricLearner]] = {
    "protonet": lambda: ProtoNet(backbone()),
    "siamese": lambda: Siamese(backbone(), D),
    "matching": lambda: MatchingNet(backbone()),
    "matching in context": lambda: MatchingNet(backbone(), context=FullContext(D, steps=2)),
    "relation": lambda: RelationNet(backbone(), LinearRelation(D, 6)),
    "conv relation": lambda: RelationNet(conv4(1, 4, pools=2, flatten=False), ConvRelation(4, (4, 4))),
    "imaginary": lambda: ImaginaryData(ProtoNet(backbone()), Hallucinator(D), imagined=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_log_probs_sum_to_one_and_are_the_same_in_every_call(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name]().eval(), episodes()
    log_probs = method.predict(drawn)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 12))
    assert torch.equal(method.predict(drawn), log_probs)


@pytest.mark.parametrize("name", METHODS)
def test_learns(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name](), episodes()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = method.loss(drawn)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    method.eval()
    assert (method.predict(drawn).argmax(-1) == drawn.query_labels).float().mean() > 0.9


def ragged() -> Episodes:
    """Where examples are left out."""
    drawn = episodes()
    support, query = drawn.support_labels.clone(), drawn.query_labels.clone()
    support[0, 1] = query[1, :3] = -100
    return Episodes(drawn.support, support, drawn.query, query)


@pytest.mark.parametrize("name", METHODS)
def test_an_ignored_query_has_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    method, drawn = METHODS[name]().eval(), ragged()
    drawn.query.requires_grad_()
    method.loss(drawn).backward()
    assert drawn.query.grad[1, :3].abs().max() == 0
    assert drawn.query.grad[1, 3:].abs().max() > 0


def test_siamese_is_logistic_regression_on_differences() -> None:
    torch.manual_seed(0)
    method, drawn = Siamese(backbone(), D), episodes()
    with torch.no_grad():
        method.weight.normal_()
    x, y = drawn.support[0], drawn.query[0, :8]
    a, b = method.backbone(x), method.backbone(y)
    expected = (method.bias - (a - b).abs() @ method.weight).sigmoid()
    torch.testing.assert_close(method.verify(x, y), expected)
    support, query = method.embed(drawn)
    pairs = method.logits(query, support)  # [T, Q, S]
    same = drawn.query_labels.unsqueeze(-1) == drawn.support_labels.unsqueeze(-2)
    halves = [-F.logsigmoid(pairs)[same].mean(), -F.logsigmoid(-pairs)[~same].mean()]
    torch.testing.assert_close(method.loss(drawn), sum(halves) / 2)
    best = pairs.unflatten(-1, (4, 2)).amax(-1)  # two examples a class, class by class
    torch.testing.assert_close(method.predict(drawn), best.log_softmax(-1))


def test_full_context_is_the_papers() -> None:
    """Equations 3 to 6 and A.2, written out: the LSTM on the query has [h, r] as its hidden state."""
    torch.manual_seed(0)
    context = FullContext(D, steps=3)
    support, query = torch.randn(1, 5, D), torch.randn(1, 1, D)
    forwards, backwards = context.forwards(support)[0], context.backwards(support.flip(1))[0].flip(1)
    seen = support + forwards + backwards
    cell = context.query
    h, c = query[0], torch.zeros(1, D)
    for _ in range(3):
        r = (h @ seen[0].T).softmax(-1) @ seen[0]
        hidden = torch.cat([h, r], 1)
        weight = torch.cat([cell.weight_hh, cell.weight_ih[:, D:]], 1)
        gates = query[0] @ cell.weight_ih[:, :D].T + cell.bias_ih + hidden @ weight.T + cell.bias_hh
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh() + query[0]
    actual_support, actual_query = context(support, query)
    torch.testing.assert_close(actual_support, seen)
    torch.testing.assert_close(actual_query[0], h)


def pairs_one_by_one(relation: ConvRelation, query: Tensor, classes: Tensor) -> Tensor:
    """The paper's module on every concatenation."""
    sizes = (*query.shape[:2], classes.shape[1], *query.shape[2:])
    pairs = torch.cat([query.unsqueeze(2).expand(sizes), classes.unsqueeze(1).expand(sizes)], 3).flatten(0, 2)
    return relation.pairs(relation.norm(relation.pair(pairs)).relu()).sigmoid().view(sizes[:3])


@pytest.mark.parametrize("training", [True, False])
def test_the_split_convolution_and_its_norm_are_those_of_all_pairs(training: bool) -> None:
    torch.manual_seed(0)
    relation = ConvRelation(3, (5, 6)).double().train(training)
    with torch.no_grad():
        relation.norm.weight.normal_()
        relation.norm.bias.normal_()
    plain = ConvRelation(3, (5, 6)).double().train(training)
    plain.load_state_dict(relation.state_dict())
    query = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    classes = torch.randn(2, 3, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    actual, expected = relation(query, classes), pairs_one_by_one(plain, query, classes)
    torch.testing.assert_close(actual, expected)
    leaves = [query, classes]
    for mine, theirs in zip(
        torch.autograd.grad(actual.square().sum(), [*leaves, *relation.parameters()]),
        torch.autograd.grad(expected.square().sum(), [*leaves, *plain.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(relation.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def fewer_classes(drawn: Episodes) -> tuple[Episodes, Episodes]:
    """Episodes of four classes, of which the second has the first two alone; and that one by itself."""
    support_labels, query_labels = drawn.support_labels.clone(), drawn.query_labels.clone()
    for labels in (support_labels, query_labels):
        labels[1, labels[1] >= 2] = -100
    of_support, of_query = support_labels[1] >= 0, query_labels[1] >= 0
    alone = Episodes(
        drawn.support[1:2, of_support],
        support_labels[1:2, of_support],
        drawn.query[1:2, of_query],
        query_labels[1:2, of_query],
    )
    ways = torch.tensor([4, 2, 4])
    return Episodes(drawn.support, support_labels, drawn.query, query_labels, ways), alone


@pytest.mark.parametrize("name", METHODS)
def test_a_task_with_fewer_classes_is_as_by_itself(name: str) -> None:
    torch.manual_seed(0)
    method, (drawn, alone) = METHODS[name](), fewer_classes(episodes())
    loss = method.loss(drawn)
    gradients = torch.autograd.grad(loss, list(method.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in [loss, *gradients] if gradient is not None)
    log_probs = method.eval().predict(drawn)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 12))
    assert (log_probs[1, :, 2:] == -torch.inf).all()
    assert log_probs[[0, 2]].isfinite().all()
    if name == "imaginary":
        method.imagined = 0  # what is imagined depends on the classes there are
        log_probs = method.predict(drawn)
    of_query = drawn.query_labels[1] >= 0
    torch.testing.assert_close(log_probs[1:2, of_query, :2], method.predict(alone), rtol=1e-4, atol=1e-5)
    for moved in (drawn.take(slice(1, 3)), drawn.to("cpu").take(torch.tensor([1, 2]))):
        assert moved.ways.tolist() == [2, 4]


@pytest.mark.parametrize("name", ["protonet", "siamese", "matching", "matching in context", "relation"])
def test_a_loss_counts_the_classes_that_a_task_has(name: str) -> None:
    torch.manual_seed(0)
    method, (drawn, alone) = METHODS[name](), fewer_classes(episodes())
    torch.testing.assert_close(method.loss(drawn.take(slice(1, 2))), method.loss(alone))


def test_relation_loss_is_the_squared_error_of_scores() -> None:
    torch.manual_seed(0)
    method, drawn = RelationNet(backbone(), LinearRelation(D, 6)), episodes()
    support, query = method.embed(drawn)
    classes = support.unflatten(1, (4, 2)).mean(2)
    scores = method.relation(query, classes)
    expected = (scores - F.one_hot(drawn.query_labels, 4)).square().mean()
    torch.testing.assert_close(method.loss(drawn), expected)
    torch.testing.assert_close(method.predict(drawn).exp(), scores / scores.sum(-1, keepdim=True))


def test_imagined_examples_begin_as_their_seeds_and_keep_their_labels() -> None:
    torch.manual_seed(0)
    method = ImaginaryData(ProtoNet(nn.Identity()), Hallucinator(D), imagined=3)
    support, labels = torch.randn(2, 5, D), torch.tensor([[0, 0, 1, 2, -100]]).repeat(2, 1)
    imagined, of_class = method.imagine(support, labels, 3)
    assert of_class.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2
    for task in range(2):
        for example, label in zip(imagined[task], of_class[task], strict=True):
            assert any(torch.equal(example, seed) for seed in support[task][labels[task] == label])


def test_imaginary_data_helps_where_classes_share_their_scatter() -> None:
    """The features are given: what the hallucinator learns of other classes' scatter is all there is."""
    torch.manual_seed(0)
    sizes = {"ways": 5, "shots": 1, "queries": 5}
    method = ImaginaryData(ProtoNet(nn.Identity()), Hallucinator(16, hidden=64), imagined=5)
    train = GaussianSampler(**sizes, tasks=32, seed=0)
    test = GaussianSampler(**sizes, tasks=400, seed=1).batch(0)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        method.loss(train.batch(step)).backward()
        optimizer.step()

    def accuracy(learner: nn.Module) -> float:
        return (learner.eval().predict(test).argmax(-1) == test.query_labels).float().mean().item()

    assert accuracy(method) > accuracy(method.learner) + 0.05
