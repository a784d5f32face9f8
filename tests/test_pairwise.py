"""What is special to the pairwise family. What holds for every operation is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import metafast
from metafast._dispatch import doors
from metafast.ops.pairwise import METRICS

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def episode(tasks: int = 2, way: int = 4, shot: int = 2, query: int = 6) -> tuple[Tensor, ...]:
    support = torch.randn(tasks, way * shot, 5, **DOUBLE)
    labels = torch.arange(way).repeat(tasks, shot)
    return support, labels, torch.randn(tasks, query, 5, **DOUBLE), torch.randint(0, way, (tasks, query))


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 64, 512])
def test_no_cancellation_far_from_the_origin(features: int, backend: torch.device) -> None:
    x = torch.full((1, features), 1e4 / features**0.5, device=backend)
    y = x + 1e-2 / features**0.5
    exact = (x.double() - y.double()).square().sum()
    assert ((metafast.pairwise_distance(x, y).double() - exact).abs() < 1e-3 * exact).all()
    euclidean = metafast.pairwise_distance(x, y, "euclidean")
    assert ((euclidean.double() - exact.sqrt()).abs() < 1e-3 * exact.sqrt()).all()


def test_many_close_points_have_no_negative_distance(backend: torch.device) -> None:
    x = 1e4 + 1e-3 * torch.randn(40, 33, device=backend)
    distance = metafast.pairwise_distance(x, x)
    assert (distance >= 0).all()
    assert (distance.diagonal() == 0).all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12])
def test_a_distant_row_leaves_the_others_their_digits(
    metric: str, factor: float, backend: torch.device
) -> None:
    x, y = torch.randn(5, 16, device=backend), torch.randn(20, 16, device=backend)
    y[-1] *= factor
    distance = metafast.pairwise_distance(x, y, metric)
    torch.testing.assert_close(distance[:, :-1], metafast.pairwise_distance(x, y[:-1], metric))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_a_row_that_is_not_finite_is_alone(metric: str, value: float, backend: torch.device) -> None:
    x, y = torch.randn(5, 16, device=backend), torch.randn(20, 16, device=backend)
    y[2, 3] = value
    distance = metafast.pairwise_distance(x, y, metric)
    others = [j for j in range(20) if j != 2]
    torch.testing.assert_close(distance[:, others], metafast.pairwise_distance(x, y[others], metric))
    assert not distance[:, 2].isfinite().any()


@pytest.mark.parametrize("of", [metafast.prototypical_log_probs, metafast.matching_log_probs])
def test_distant_classes_keep_the_digits_of_their_probabilities(
    of: Callable[..., Tensor], backend: torch.device
) -> None:
    support = torch.tensor([[100.0, 3.0], [100.0, -3.0]], device=backend)
    labels, query = torch.tensor([0, 1], device=backend), torch.zeros(1, 2, device=backend).requires_grad_()
    log_probs = of(support, labels, query, 2, metric="sqeuclidean")
    torch.testing.assert_close(log_probs, torch.full_like(log_probs, 0.5).log())
    (grad,) = torch.autograd.grad(log_probs[0, 0], query)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 6.0]], device=backend), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_derivatives_where_they_do_not_exist_are_finite(metric: str, backend: torch.device) -> None:
    x = torch.zeros(3, 4, **DOUBLE, device=backend).requires_grad_()
    y = torch.zeros(2, 4, **DOUBLE, device=backend)
    (grad,) = torch.autograd.grad(metafast.pairwise_distance(x, y, metric).sum(), x, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(grad))
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()


def test_distances_are_those_of_torch() -> None:
    x, y = torch.randn(3, 6, 5, **DOUBLE), torch.randn(3, 4, 5, **DOUBLE)
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    expected = {
        "sqeuclidean": torch.cdist(x, y, **exact) ** 2,
        "euclidean": torch.cdist(x, y, **exact),
        "cityblock": torch.cdist(x, y, p=1),
        "cosine": 1 - F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1),
        "dot": -x @ y.mT,
    }
    assert set(expected) == set(METRICS)
    for metric, distance in expected.items():
        assert_close(metafast.pairwise_distance(x, y, metric), distance, torch.float64)


def test_loss_is_the_cross_entropy_of_the_distances() -> None:
    support, labels, query, query_labels = episode()
    query_labels[0, 1] = -100
    prototypes = torch.stack([support[:, labels[0] == n].mean(1) for n in range(4)], 1)
    logits = -(torch.cdist(query, prototypes) ** 2)
    for reduction in ("none", "mean", "sum"):
        expected = F.cross_entropy(logits.flatten(0, 1), query_labels.flatten(), reduction=reduction)
        loss = metafast.prototypical_loss(support, labels, query, query_labels, 4, reduction=reduction)
        assert_close(loss.reshape(expected.shape), expected, torch.float64)


def test_matching_is_attention_over_the_support() -> None:
    support, labels, query, query_labels = episode()
    attention = torch.softmax(-3.0 * metafast.pairwise_distance(query, support, "cosine"), -1)
    expected = torch.log(attention @ F.one_hot(labels, 4).double())
    log_probs = metafast.matching_log_probs(support, labels, query, 4, scale=3.0)
    assert_close(log_probs, expected, torch.float64)
    loss = metafast.matching_loss(support, labels, query, query_labels, 4, scale=3.0)
    assert_close(loss, F.nll_loss(expected.flatten(0, 1), query_labels.flatten()), torch.float64)


def test_matching_of_a_distant_class_keeps_its_probability() -> None:
    support = torch.tensor([[0.0], [100.0]])
    log_probs = metafast.matching_log_probs(
        support, torch.tensor([0, 1]), torch.zeros(1, 1), 2, metric="cityblock"
    )
    torch.testing.assert_close(log_probs, torch.tensor([[0.0, -100.0]]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_relation_scores_are_those_of_concatenated_pairs(activation: str) -> None:
    first, second = torch.nn.Linear(10, 7, **DOUBLE), torch.nn.Linear(7, 1, **DOUBLE)
    query, prototypes = torch.randn(3, 6, 5, **DOUBLE), torch.randn(3, 4, 5, **DOUBLE)
    pairs = torch.cat(torch.broadcast_tensors(query.unsqueeze(-2), prototypes.unsqueeze(-3)), -1)
    expected = torch.sigmoid(second(getattr(torch, activation)(first(pairs)))).squeeze(-1)
    head = (first.weight, first.bias, second.weight, second.bias)
    scores = metafast.relation_scores(query, prototypes, *head, activation=activation)
    assert_close(scores, expected, torch.float64)
    assert_close(
        torch.autograd.grad(scores.square().sum(), head),
        torch.autograd.grad(expected.square().sum(), head),
        torch.float64,
    )


def test_relation_scores_take_a_flat_output_layer() -> None:
    query, prototypes, weight, bias = (torch.randn(*shape) for shape in ((6, 5), (4, 5), (7, 10), (7,)))
    out_weight, out_bias = torch.randn(7), torch.randn(())
    flat = metafast.relation_scores(query, prototypes, weight, bias, out_weight, out_bias)
    linear = metafast.relation_scores(query, prototypes, weight, bias, out_weight[None], out_bias[None])
    torch.testing.assert_close(flat, linear, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("features", "hidden", "queries"),
    [(68, 64, 45), (68, 100, 200), (5, 7, 6), (33, 70, 110), (0, 3, 2), (4, 3, 0)],
    ids=["small tiles", "large tiles", "odd", "odd, large tiles", "no features", "no queries"],
)
def test_first_layer_of_a_relation_head(
    features: int, hidden: int, queries: int, dtype: torch.dtype, backend: torch.device
) -> None:
    """To float32's accuracy on tensor cores, whose numbers have 11 bits. Leading dimensions may differ."""
    shapes = (3, queries, features), (2, 4, features), (hidden, 2 * features), (hidden,)
    wide = [torch.randn(*shape, **DOUBLE) for shape in shapes]
    wide[2] *= max(features, 1) ** -0.5
    wide = [tensor.to(dtype).double().requires_grad_() for tensor in wide]
    given = [tensor.detach().to(backend, dtype).requires_grad_() for tensor in wide]

    def with_gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
        return [*results, *torch.autograd.grad(sum(r.sin().sum() for r in results), leaves)]

    query, prototypes, weight, bias = wide
    linear = F.linear(query, weight[:, :features], bias), F.linear(prototypes, weight[:, features:])
    expected = with_gradients(linear, wide)
    found = with_gradients(doors.ops.relation_layer(*given), given)
    assert all(one.dtype == dtype for one in found)
    assert_close(found[:2], expected[:2], (1e-5, 1e-5) if dtype == torch.float32 else dtype)
    assert_close(found[2:], expected[2:], (1e-4, 1e-4) if dtype == torch.float32 else dtype)


# --- ragged episodes ------------------------------------------------------------------------------------


def test_ignored_examples_change_nothing(backend: torch.device) -> None:
    args = [arg.to(backend) for arg in episode()]
    ignored = torch.full((2, 3), -100, device=backend)
    noise = torch.randn(2, 3, 5, **DOUBLE, device=backend) * 100
    padded = [torch.cat([args[i], (noise, ignored)[i % 2]], 1) for i in range(4)]
    for loss in (metafast.prototypical_loss, metafast.matching_loss):
        for reduction in ("mean", "sum"):
            expected, actual = loss(*args, 4, reduction=reduction), loss(*padded, 4, reduction=reduction)
            assert_close(actual, expected, torch.float64)
        none = loss(*padded, 4, reduction="none")
        assert (none[:, -3:] == 0).all()
        grads = [arg.requires_grad_() for arg in (padded[0], padded[2])]
        for grad in torch.autograd.grad(loss(*padded, 4), grads):
            assert (grad[:, -3:] == 0).all()
            assert (grad[:, :-3] != 0).all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("name", ["prototypical_loss", "matching_loss"])
def test_more_rows_and_queries_than_a_block_takes_at_once(
    name: str, metric: str, backend: torch.device
) -> None:
    support, query = torch.randn(320, 3, **DOUBLE), torch.randn(40, 3, **DOUBLE)
    labels, query_labels = torch.randperm(320), torch.randint(0, 320, (40,))
    results = []
    for module, device in ((metafast, backend), (metafast.reference, "cpu")):
        leaves = [t.to(device).requires_grad_() for t in (support, query)]
        args = leaves[0], labels.to(device), leaves[1], query_labels.to(device)
        loss = getattr(module, name)(*args, 320, metric=metric)
        results.append([t.cpu() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    assert_close(*results, torch.float64)


@pytest.mark.parametrize("content", [0.0, 1e10, torch.inf, torch.nan])
@pytest.mark.parametrize("metric", METRICS)
def test_what_an_ignored_support_example_holds_changes_nothing(
    metric: str, content: float, backend: torch.device
) -> None:
    support, query = torch.randn(12, 5, device=backend), torch.randn(6, 5, device=backend)
    labels, query_labels = torch.arange(12, device=backend) % 3, torch.arange(6, device=backend) % 3
    labels[-1] = -100
    found = []
    for value in (1.0, content):
        support[-1] = value
        args = [support.clone().requires_grad_(), labels, query.clone().requires_grad_(), query_labels]
        for module in (metafast, metafast.reference):
            for loss in (module.prototypical_loss, module.matching_loss):
                out = loss(*args, 3, metric=metric)
                found.append([out.detach(), *torch.autograd.grad(out, (args[0], args[2]))])
    for one, other in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(one, other)
        assert all(tensor.isfinite().all() for tensor in other)


def test_padded_episodes_are_the_single_ones(backend: torch.device) -> None:
    ways = (2, 4, 3)
    single = [
        [arg.to(backend)[0] for arg in episode(1, way, shot, query=4)] for shot, way in enumerate(ways, 1)
    ]
    size = max(len(support) for support, *_ in single)

    def pad(tensor: Tensor, value: float) -> Tensor:
        padding = (0, 0) * (tensor.dim() - 1) + (0, size - len(tensor))
        return F.pad(tensor, padding, value=value)

    padded = [torch.stack([pad(args[i], -100 if i % 2 else 7.0) for args in single]) for i in range(4)]
    for name in ("prototypical", "matching"):
        loss, log_probs = getattr(metafast, f"{name}_loss"), getattr(metafast, f"{name}_log_probs")
        options = {"ways": torch.tensor(ways, device=backend), "metric": "sqeuclidean"}
        losses = loss(*padded, 4, reduction="none", **options)
        probabilities = log_probs(*padded[:3], 4, **options)
        for t, (way, args) in enumerate(zip(ways, single, strict=True)):
            alone = loss(*args, way, reduction="none", metric="sqeuclidean")
            assert_close(losses[t, : len(alone)], alone, torch.float64)
            alone = log_probs(*args[:3], way, metric="sqeuclidean")
            assert_close(probabilities[t, : len(alone), :way], alone, torch.float64)
            assert (probabilities[t, :, way:] == -torch.inf).all()


def test_an_absent_class_has_no_gradient(backend: torch.device) -> None:
    support, labels, query, _ = (arg.to(backend) for arg in episode(tasks=1))
    labels = torch.where(labels == 3, -100, labels)
    support.requires_grad_()
    grads = []
    for weight in (1.0, 5.0):  # of the absent class in the sum over classes
        log_probs = metafast.prototypical_log_probs(
            support, labels, query, 4, ways=torch.tensor([3], device=backend)
        )
        weights = torch.tensor([1.0, 2.0, 3.0, weight], **DOUBLE, device=backend)
        grads.append(torch.autograd.grad(log_probs, support, weights.expand_as(log_probs))[0])
    assert grads[0].isfinite().all()
    assert torch.equal(*grads)


def test_classes_of_different_shot() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    embeddings = torch.randn(6, 5, **DOUBLE)
    expected = torch.stack([embeddings[labels == n].mean(0) for n in range(3)])
    assert_close(metafast.prototypes(embeddings, labels, 3), expected, torch.float64)


def test_a_loss_can_be_scaled_and_differentiated_twice_over() -> None:
    """The forward finds the gradients of the loss itself; a backward may want others, or a second time."""
    support, labels, query, query_labels = episode()
    query.requires_grad_()
    loss = metafast.prototypical_loss(support, labels, query, query_labels, 4)
    (plain,) = torch.autograd.grad(loss, query, retain_graph=True)
    kept = plain.clone()
    plain.zero_()
    (again,) = torch.autograd.grad(loss, query, retain_graph=True)
    assert_close(again, kept, torch.float64)
    loss = metafast.prototypical_loss(support, labels, query, query_labels, 4)
    (scaled,) = torch.autograd.grad(3 * loss, query)
    assert_close(scaled, 3 * kept, torch.float64)


def test_a_scaled_loss_keeps_small_gradients_of_half_precision() -> None:
    support, labels, query, query_labels = (t.half() if t.is_floating_point() else t for t in episode())
    (query := 1e-3 * query).requires_grad_()
    support = 1e-3 * support
    loss = metafast.prototypical_loss(support, labels, query, query_labels, 4, reduction="mean")
    (grad,) = torch.autograd.grad(loss.float() * 2.0**14, query)
    exact_query = query.detach().double().requires_grad_()
    exact = metafast.prototypical_loss(support.double(), labels, exact_query, query_labels, 4)
    (expected,) = torch.autograd.grad(exact * 2.0**14, exact_query)
    assert_close(grad, expected, torch.float16)


def test_a_large_class_keeps_the_digits_of_its_mean() -> None:
    embeddings = torch.rand(300_000, 2) + 10
    found = metafast.prototypes(embeddings, torch.zeros(len(embeddings), dtype=torch.int64), 1)
    torch.testing.assert_close(found[0], embeddings.double().mean(0).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", ["prototypes", "matching_log_probs", "prototypical_log_probs"])
def test_no_support_at_all_is_refused(function: str) -> None:
    nothing, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    args = [nothing, labels, *([torch.randn(2, 4)] if function != "prototypes" else []), 3]
    for module in (metafast, metafast.reference):
        with pytest.raises(ValueError, match="labels: expected a support example of every class"):
            getattr(module, function)(*args)


def test_relation_scores_of_half_precision_are_computed_in_float32() -> None:
    query, prototypes = torch.tensor([[280.0]]).half(), torch.tensor([[-280.0]]).half()
    head = [torch.tensor([[250.0, 250.0]]), torch.zeros(1), torch.ones(1), torch.zeros(())]
    for module in (metafast, metafast.reference):
        scores = module.relation_scores(query, prototypes, *(t.half() for t in head))
        assert scores.dtype == torch.float16
        assert scores.item() == 0.5


def test_mean_over_no_query_is_nan() -> None:
    support, labels, query, query_labels = episode()
    query_labels.fill_(-100)
    assert metafast.prototypical_loss(support, labels, query, query_labels, 4).isnan()
    assert metafast.prototypical_loss(support, labels, query, query_labels, 4, reduction="sum") == 0


# --- errors ---------------------------------------------------------------------------------------------


def failing_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    support, labels, query, query_labels = episode()
    x, y = query, support

    def loss(**changes: Any) -> Callable[[], Any]:
        args = {"support": support, "support_labels": labels, "query": query, "query_labels": query_labels}
        return lambda: metafast.prototypical_loss(**{**args, "num_classes": 4, **changes})

    def at(tensor: Tensor, value: int) -> Tensor:
        changed = tensor.clone()
        changed[1, 2] = value
        return changed

    def relation(**changes: Tensor) -> Callable[[], Any]:
        head = {"weight": torch.zeros(7, 10, **DOUBLE), "bias": torch.zeros(7, **DOUBLE)}
        head |= {"out_weight": torch.zeros(7, **DOUBLE), "out_bias": torch.zeros(1, **DOUBLE)}
        return lambda: metafast.relation_scores(query, support, **{**head, **changes})

    ones = torch.ones(5, **DOUBLE)
    return {
        "support label": (
            r"support_labels: .* got 4 at position 2 of task 1",
            loss(support_labels=at(labels, 4)),
        ),
        "negative label": (r"support_labels: .* got -1", loss(support_labels=at(labels, -1))),
        "query label": (
            r"query_labels: .* got 9 at position 2 of task 1",
            loss(query_labels=at(query_labels, 9)),
        ),
        "missing class": (r"support_labels: .*every class.* class 4", loss(num_classes=5)),
        "ways": (r"ways: .*\[1, num_classes = 4\], got 5", loss(ways=torch.tensor([4, 5]))),
        "label beyond ways": (r"support_labels: .*\[0, 2\)", loss(ways=torch.tensor([4, 2]))),
        "leading": (
            r"leading dimensions: .*support \[2\], .*query \[3\]",
            loss(query=torch.zeros(3, 6, 5, **DOUBLE)),
        ),
        "features": (r"query: .*features of support, 5, got 4", loss(query=query[..., :4])),
        "reduction": (r"reduction: expected 'none', 'mean' or 'sum', got 'avg'", loss(reduction="avg")),
        "metric": (r"metric: expected one of sqeuclidean, .*'l2'", loss(metric="l2")),
        "relation metric": (
            r"metric: expected one of",
            lambda: metafast.pairwise_distance(x, y, "relation_relu"),
        ),
        "no class": (r"num_classes", loss(num_classes=0)),
        "weight": (
            r"weight: expected None with metric 'cosine'",
            lambda: metafast.pairwise_distance(x, y, "cosine", weight=ones),
        ),
        "weight size": (
            r"weight: expected shape \[D\] = \[5\], got \[4\]",
            lambda: metafast.pairwise_distance(x, y, weight=ones[:4]),
        ),
        "pair features": (r"y: .*features of x, 5, got 3", lambda: metafast.pairwise_distance(x, y[..., :3])),
        "one dimension": (r"x: expected 2 dimensions", lambda: metafast.pairwise_distance(x[0, 0], y)),
        "prototype label": (r"labels: .*got 7", lambda: metafast.prototypes(support, at(labels, 7), 4)),
        "activation": (
            r"activation: expected 'relu' or 'tanh', got 'gelu'",
            lambda: metafast.relation_scores(query, support, ones, ones, ones, ones, activation="gelu"),
        ),
        "relation weight": (
            r"weight: expected shape \[7, 10\], got \[7, 9\]",
            relation(weight=torch.zeros(7, 9)),
        ),
        "relation output": (
            r"out_weight: expected shape \[7\] or \[1, 7\]",
            relation(out_weight=torch.zeros(7, 1)),
        ),
    }


@pytest.mark.parametrize("case", failing_calls())
def test_errors_say_what_was_expected(case: str) -> None:
    message, call = failing_calls()[case]
    with pytest.raises(ValueError, match=message):
        call()


def calls_of_wrong_types() -> dict[str, tuple[str, Callable[[], Any]]]:
    support, labels, query, query_labels = episode()

    def call(name: str, **changes: Any) -> Callable[[], Any]:
        args = {"support": support, "support_labels": labels, "query": query, "num_classes": 4}
        if name.endswith("loss"):
            args["query_labels"] = query_labels
        return lambda: getattr(metafast, name)(**{**args, **changes})

    def relation(**changes: Any) -> Callable[[], Any]:
        head = {"weight": torch.zeros(7, 10, **DOUBLE), "bias": torch.zeros(7, **DOUBLE)}
        head |= {"out_weight": torch.zeros(7, **DOUBLE), "out_bias": torch.zeros(1, **DOUBLE)}
        return lambda: metafast.relation_scores(query, support, **{**head, **changes})

    def distance(*args: Any, **options: Any) -> Callable[[], Any]:
        return lambda: metafast.pairwise_distance(*args, **options)

    temperature = torch.tensor(2.0, requires_grad=True)
    return {
        "list": (
            "support_labels: expected a tensor, got list",
            call("prototypical_loss", support_labels=[0]),
        ),
        "array": ("query: expected a tensor, got ndarray", call("prototypical_loss", query=query.numpy())),
        "no tensor": ("support: expected a tensor, got None", call("matching_log_probs", support=None)),
        "no labels": ("query_labels: expected a tensor, got list", call("matching_loss", query_labels=[1])),
        "ways": ("ways: expected a tensor, got int", call("prototypical_log_probs", ways=5)),
        "float": ("num_classes: expected an integer, got 4.0", call("prototypical_loss", num_classes=4.0)),
        "word": ("scale: expected a number, got 'a'", call("matching_loss", scale="a")),
        "temperature": (
            r"scale: expected a number, got a tensor, .*F.normalize\(query, dim=-1\) times it",
            call("matching_loss", scale=temperature),
        ),
        "squared temperature": (
            "scale: expected a number, got a tensor, .*multiply support and query by its square root",
            call("matching_log_probs", scale=temperature, metric="sqeuclidean"),
        ),
        "y": ("y: expected a tensor, got list", distance(query, [[1.0]])),
        "arrays": ("x: expected a tensor, got ndarray", distance(query.numpy(), support.numpy())),
        "weight": ("weight: expected a tensor, got float", distance(query, support, weight=1.0)),
        "bias": ("bias: expected a tensor, got None", relation(bias=None)),
        "out_weight": (
            "out_weight: expected a tensor, got ndarray",
            relation(out_weight=torch.zeros(7).numpy()),
        ),
        "labels": (
            "labels: expected a tensor, got list",
            lambda: metafast.prototypes(support, labels.tolist(), 4),
        ),
        "classes": (
            "num_classes: expected an integer, got 4.0",
            lambda: metafast.prototypes(support, labels, 4.0),
        ),
    }


@pytest.mark.parametrize("case", calls_of_wrong_types())
def test_wrong_types_are_named(case: str) -> None:
    message, call = calls_of_wrong_types()[case]
    with pytest.raises(TypeError, match=f"^{message}"):
        call()


def test_wrong_types_are_named_in_a_transform() -> None:
    support, labels, *rest = episode()
    with pytest.raises(TypeError, match=r"^num_classes: expected an integer, got 4\.0"):
        torch.func.grad(lambda support: metafast.prototypical_loss(support, labels, *rest, 4.0))(support)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["matching_loss", "matching_log_probs"])
def test_scale_is_finite(name: str, scale: float) -> None:
    args = episode()[: 4 if name == "matching_loss" else 3]
    with pytest.raises(ValueError, match=f"scale: expected a finite number, got {scale}"):
        getattr(metafast, name)(*args, 4, scale=scale)


@pytest.mark.parametrize("metric", METRICS)
def test_a_learned_scale_goes_into_the_embeddings(metric: str) -> None:
    """What the error of a tensor advises is the same function, and has a gradient."""
    support, labels, query, query_labels = episode()
    scale = torch.tensor(2.5, **DOUBLE, requires_grad=True)
    scaled = {
        "sqeuclidean": (support * scale.sqrt(), query * scale.sqrt()),
        "cosine": (F.normalize(support, dim=-1), F.normalize(query, dim=-1) * scale),
        "dot": (support, query * scale),
    }.get(metric, (support * scale, query * scale))
    options = {"metric": "dot" if metric == "cosine" else metric}
    loss = metafast.matching_loss(scaled[0], labels, scaled[1], query_labels, 4, **options)

    def given(scale: float) -> Tensor:
        return metafast.matching_loss(support, labels, query, query_labels, 4, metric=metric, scale=scale)

    assert_close(loss, given(2.5), torch.float64)
    slope = (given(2.5 + 1e-6) - given(2.5 - 1e-6)) / 2e-6
    torch.testing.assert_close(*torch.autograd.grad(loss, scale), slope, rtol=1e-6, atol=1e-8)


# --- the doors ------------------------------------------------------------------------------------------


def test_labels_are_checked_in_a_traced_transform() -> None:
    """A graph cannot ask for values, so it asserts them where it runs."""
    args = episode()

    def tangent(support: Tensor, *rest: Tensor) -> Tensor:
        return torch.func.jvp(lambda s: metafast.prototypical_loss(s, *rest, 4), (support,), (support,))[1]

    for mode in ("real", "fake"):
        graph = make_fx(tangent, tracing_mode=mode)(*args)
        assert_close(graph(*args), tangent(*args), torch.float64)
        with pytest.raises(RuntimeError, match="query_labels: expected classes"):
            graph(*args[:3], torch.full_like(args[3], 4))


def test_trace_doors() -> None:
    x, y = torch.randn(4, 3), torch.randn(2, 3)

    def total(x: Tensor) -> Tensor:
        return metafast.pairwise_distance(x, y).sum()

    with metafast.trace_doors() as doors:
        total(x)
        torch.func.grad(total)(x)
        torch.func.jvp(total, (x,), (x,))
    total(x)
    assert doors == [("pairwise", "op"), ("pairwise", "function"), ("pairwise", "reference")]


def test_vmap_gives_each_episode_its_own_loss() -> None:
    args = episode(tasks=3)
    losses = torch.vmap(lambda *args: metafast.prototypical_loss(*args, 4))(*args)
    expected = torch.stack([metafast.prototypical_loss(*(arg[t] for arg in args), 4) for t in range(3)])
    assert_close(losses, expected, torch.float64)


def test_weight_gradient_of_each_vmapped_example() -> None:
    x, y, weight = torch.randn(3, 4, 5, **DOUBLE), torch.randn(2, 5, **DOUBLE), torch.rand(5, **DOUBLE)

    def total(weight: Tensor, x: Tensor) -> Tensor:
        return metafast.pairwise_distance(x, y, weight=weight).square().sum()

    grads = torch.vmap(torch.func.grad(total), (None, 0))(weight, x)
    assert_close(grads, torch.stack([torch.func.grad(total)(weight, one) for one in x]), torch.float64)


def test_tensor_subclass() -> None:
    one, two = torch.randn(4, 3, **DOUBLE), torch.randn(4, 3, **DOUBLE)
    y = torch.randn(2, 3, **DOUBLE)
    pair = TwoTensor(one, two).requires_grad_()  # runs every op on both tensors
    out = metafast.pairwise_distance(pair, TwoTensor(y, y))
    assert_close([out.a, out.b], [metafast.pairwise_distance(t, y) for t in (one, two)], torch.float64)
    (grad,) = torch.autograd.grad(out.sum(), pair)
    (expected,) = torch.autograd.grad(metafast.pairwise_distance(two.requires_grad_(), y).sum(), two)
    assert_close(grad.b, expected, torch.float64)


def test_the_loss_holds_no_query_by_class_by_feature_tensor() -> None:
    args = [arg.requires_grad_(arg.is_floating_point()) for arg in episode(way=20, query=30)]
    of_pairs = 20 * args[2].numel() * args[2].element_size()
    largest = []
    for module in (metafast, metafast.reference):
        with torch.profiler.profile(profile_memory=True) as profile:
            module.prototypical_loss(*args, 20).backward()
        largest.append(max(event.cpu_memory_usage for event in profile.events()))
    assert largest[0] < of_pairs / 2
    assert largest[1] >= of_pairs  # so the measurement sees such a tensor


def test_hvp_says_that_vhp_works() -> None:
    """hvp takes a third derivative on its way, vhp does not."""
    x, y, v = (torch.randn(2, n, 5, **DOUBLE) for n in (6, 4, 6))

    def value(x: Tensor) -> Tensor:
        return metafast.pairwise_distance(x, y).sin().sum()

    with pytest.raises(NotImplementedError, match=r"vhp, of the same product, does not"):
        torch.autograd.functional.hvp(value, x, v)
    product = torch.autograd.functional.vhp(value, x, v)[1]
    hessian = torch.func.hessian(lambda x: (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3).sin().sum())(x)
    torch.testing.assert_close(product, torch.einsum("abcdef,def->abc", hessian, v))
