"""adapt of convolutional networks: fused, against a plain loop over tasks and steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import LOSSES, STEPS, TASKS, plain, with_gradients
from record_ops import RecordOps
from torch import Tensor, nn

import metafast

Make = Callable[[], nn.Module]


class Block(nn.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), True

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pool else x


class Named(nn.Module):
    """As people write it: named blocks, the head before them, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.blocks = nn.ModuleList([Block(1, 5), Block(5, 4), Block(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.view(x.size(0), -1))


class Strided(nn.Module):
    """Finn's for Omniglot, smaller: strides, and a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.second, self.head = nn.Conv2d(4, 4, 3, stride=2, padding="valid"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.second(x).tanh_().mean(dim=[2, 3]))


class Branching(Strided):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if x.size(0) > 7:
            x = F.relu(x)
        return self.head(self.second(x).mean((2, 3)))


class Fixed(Strided):
    """The same for five examples alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.norm(self.first(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(5, 4))


class Frozen(Strided):
    """A batch norm by numbers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), None, None, training=True, eps=1e-3)
        return self.head(F.avg_pool2d(self.second(F.relu(x)), 3).flatten(1))


def block(
    ins: int, outs: int, *, kernel: Any = 3, pool: nn.Module | None = None, **norm: Any
) -> list[nn.Module]:
    pool = nn.MaxPool2d(2) if pool is None else pool
    return [nn.Conv2d(ins, outs, kernel, padding="same"), nn.BatchNorm2d(outs, **norm), nn.ReLU(), pool]


def conv3() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(*block(1, 5)), nn.Sequential(*block(5, 4)), *block(4, 4), nn.Flatten(), nn.Linear(4, 3)
    )


def pooled_first() -> nn.Module:
    norm = nn.BatchNorm2d(4, momentum=0.3, affine=False)
    first = [nn.Conv2d(1, 4, (3, 5), bias=False), norm, nn.AvgPool2d((2, 1)), nn.Identity()]
    second = [nn.Conv2d(4, 6, 1, stride=(1, 2)), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *first, nn.Tanh(), *second, nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def without_norm() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 3, bias=False))


def untracked() -> nn.Module:
    return nn.Sequential(
        *block(1, 3, track_running_stats=False), *block(3, 2, momentum=1.0), nn.Flatten(), nn.Linear(6, 3)
    )


NETWORKS: dict[str, tuple[Make, tuple[int, ...]]] = {  # and the shape of an image
    "three blocks": (conv3, (1, 13, 9)),
    "pooled first": (pooled_first, (1, 7, 9)),
    "without norm": (without_norm, (1, 7, 5)),
    "untracked": (untracked, (1, 7, 13)),
    "named": (Named, (1, 9, 8)),
    "strided": (Strided, (1, 13, 9)),
    "frozen": (Frozen, (1, 13, 13)),
}


def make(name: str, loss: str = "cross_entropy", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """The network, and support x, y, query x, y; the left halves of the images are empty."""
    torch.manual_seed(0)
    of, shape = NETWORKS[name]
    module = of().to(dtype)
    data: list[Tensor] = []
    for count in (5, 4):
        x = torch.randn(TASKS, count, *shape, dtype=dtype)
        x[..., : shape[2] // 2] = 0
        data.append(x.requires_grad_())
        if loss == "cross_entropy":
            data.append(torch.randint(0, 3, (TASKS, count)))
        else:
            data.append(torch.randn(TASKS, count, 3, dtype=dtype).requires_grad_())
    return module, data


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_is_the_plain_loop(name: str, loss: str, first_order: bool) -> None:
    module, (x, y, query_x, query_y) = make(name, loss)
    before = [buffer.clone() for buffer in module.buffers()]
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = [*module.parameters(), lr, query_x]
    leaves += [] if first_order else [x, *([y] if loss == "mse" else [])]
    options = {"first_order": first_order, "momentum": 0.6}
    adapted = metafast.adapt(module, x, y, loss=loss, lr=lr, steps=STEPS, **options)
    assert adapted.path == "fused"
    assert list(adapted.params) == [n for n, _ in module.named_parameters()]
    rates = [lr] * len(list(module.parameters()))
    expected, buffers = plain(module, x, y, query_x, loss=LOSSES[loss], lr=rates, **options)
    close(*(with_gradients(out, query_y, loss, leaves) for out in (adapted(query_x), expected)))
    assert adapted.buffers.keys() == buffers[0].keys()
    for key, found in adapted.buffers.items():
        close(found, torch.stack([b[key] for b in buffers]))
    assert all(torch.equal(b, old) for b, old in zip(module.buffers(), before, strict=True))


def test_in_float32_on_large_images() -> None:
    torch.manual_seed(0)
    blocks = [layer for ins in (3, 8, 8, 8) for layer in block(ins, 8)]
    module = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(200, 5))
    x, query_x, y = torch.randn(2, 5, 3, 84, 84), torch.randn(2, 3, 3, 84, 84), torch.arange(5).expand(2, 5)
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.01, steps=1)
    assert adapted.path == "fused"
    wide = copy.deepcopy(module).double()
    expected = metafast.adapt(wide, x.double(), y, loss="cross_entropy", lr=0.01, steps=1, path="torch.func")
    found, wanted = adapted(query_x), expected(query_x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "kind", ["number", "sequence", "dict", "steps and layers", "with momentum", "no norm"]
)
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
def test_learning_rates(kind: str, first_order: bool) -> None:
    """Batch norm is a layer of its own in lr [K, L], which the kernels do not know with momentum."""
    module, (x, y, query_x, query_y) = make("without norm" if kind == "no norm" else "named")
    names = [name for name, _ in module.named_parameters()]
    lr: Any = 0.05
    if kind in ("sequence", "dict"):
        lr = [(0.1 * torch.rand_like(p)).requires_grad_() for p in module.parameters()]
    elif kind != "number":
        layers = len(dict.fromkeys(name.rpartition(".")[0] for name in names))
        lr = (0.1 * torch.rand(STEPS, layers, dtype=torch.float64)).requires_grad_()
    given = dict(zip(names, lr, strict=True)) if kind == "dict" else lr
    leaves = [*module.parameters(), *(lr if isinstance(lr, list) else [lr] if kind != "number" else [])]
    options = {"first_order": first_order, "momentum": 0.5 if kind in ("with momentum", "no norm") else 0.0}
    found = []
    for path in (None, "loop"):
        adapted = metafast.adapt(
            module, x, y, loss="cross_entropy", lr=given, steps=STEPS, path=path, **options
        )
        found.append(with_gradients(adapted(query_x), query_y, "cross_entropy", leaves))
        if path is None:
            assert adapted.path == ("torch.func" if kind == "with momentum" else "fused")
    close(*found)


@pytest.mark.parametrize("kind", ["number", "steps and layers"])
def test_a_batch_for_each_step(kind: str) -> None:
    module, (x, y, query_x, query_y) = make("named")
    x = torch.stack([x.detach(), 2 * x.detach().flip(1)]).requires_grad_()
    y = torch.stack([y, y.flip(1)])
    layers = len({name.rpartition(".")[0] for name, _ in module.named_parameters()})
    lr = torch.tensor(0.1, dtype=torch.float64)
    if kind == "steps and layers":
        lr = 0.1 * torch.rand(STEPS, layers, dtype=torch.float64)
    leaves = [*module.parameters(), x, lr.requires_grad_()]
    options = {"loss": "cross_entropy", "lr": lr, "steps": STEPS, "per_step": True}
    found, expected = (metafast.adapt(module, x, y, path=path, **options) for path in (None, "loop"))
    assert found.path == "fused"
    close(dict(sorted(found.buffers.items())), dict(sorted(expected.buffers.items())))
    close(*(with_gradients(of(query_x), query_y, "cross_entropy", leaves) for of in (found, expected)))
    assert metafast.adapt(module, x, y, momentum=0.5, **options).path == "torch.func"


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_examples(loss: str) -> None:
    """Batch norm sees zeros in the place of the example of weight 0, whatever it holds."""
    _, (x, y, query_x, query_y) = make("three blocks", loss)
    x, query_x = (F.pad(images.detach(), (0, 7, 0, 4)) for images in (x, query_x))  # [..., 17, 16]
    conv4 = [layer for ins in (1, 4, 4, 4) for layer in block(ins, 4)]
    module = nn.Sequential(*conv4, nn.Flatten(), nn.Linear(4, 3)).double()
    weights = torch.rand(TASKS, 5, dtype=torch.float64)
    weights[0, 1] = 0
    with torch.no_grad():
        x[0, 1] = torch.nan
        y[0, 1] = -7 if loss == "cross_entropy" else torch.nan
    leaves = [*module.parameters(), weights.requires_grad_(), x.requires_grad_()]
    leaves += [y] if loss == "mse" else []
    options = {"loss": loss, "lr": 0.1, "steps": STEPS, "momentum": 0.6}
    adapted = metafast.adapt(module, x, y, example_weights=weights, **options)
    assert adapted.path == "fused"

    def weighted(out: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        y, weights = given
        each = LOSSES[loss](out, y, reduction="none")
        each = each.mean(1) if loss == "mse" else each
        return (weights * each).sum() / weights.sum()

    def cleared(examples: Tensor) -> Tensor:
        counts = (weights != 0).view(TASKS, 5, *[1] * (examples.dim() - 2))
        return torch.where(counts, examples, 0)

    pairs, rates = (
        list(zip(cleared(y), cleared(weights), strict=True)),
        [0.1] * len(list(module.parameters())),
    )
    expected, buffers = plain(module, cleared(x), pairs, query_x, loss=weighted, lr=rates, momentum=0.6)
    close(*(with_gradients(out, query_y, loss, leaves) for out in (adapted(query_x), expected)))
    for key, buffer in adapted.buffers.items():
        close(buffer, torch.stack([b[key] for b in buffers]))


def test_labels_left_out_and_a_task_without_examples() -> None:
    module, (x, y, query_x, _) = make("without norm")
    y[0] = -100
    y[1, 2:] = -100
    out = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.5, steps=STEPS, path="fused")(query_x)
    close(out[0], module(query_x[0]))
    alone = metafast.adapt(module, x[1:2, :2], y[1:2, :2], loss="cross_entropy", lr=0.5, steps=STEPS)
    close(out[1:2], alone(query_x[1:2]))
    none = metafast.adapt(module, x[:, :0], y[:, :0], loss="cross_entropy", lr=0.5, steps=STEPS, path="fused")
    close(none(query_x)[2], module(query_x[2]))


def test_no_steps_and_no_tasks() -> None:
    module, (x, y, query_x, _) = make("three blocks")
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.5, steps=0, path="fused")
    close(adapted(query_x), torch.stack([copy.deepcopy(module)(task) for task in query_x]))
    assert adapted.buffers["0.1.num_batches_tracked"].tolist() == [0] * TASKS
    adapted = metafast.adapt(module, x[:0], y[:0], loss="cross_entropy", lr=0.5, steps=1)
    assert adapted(query_x[:0]).shape == (0, 4, 3)


@pytest.mark.parametrize("momentum", [None, 0.2])
def test_running_statistics_go_on(momentum: float | None) -> None:
    """Those of an Adapted that adapts further; evaluation goes by them."""
    module, (x, y, query_x, _) = make("three blocks")
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    options = {"loss": "cross_entropy", "lr": 0.1}
    found, expected = (
        metafast.adapt(
            metafast.adapt(module, x, y, steps=2, path=path, **options), x, y, steps=1, path=path, **options
        )
        for path in ("fused", "loop")
    )
    close(found.params, expected.params)
    close(dict(sorted(found.buffers.items())), dict(sorted(expected.buffers.items())))
    close(found(query_x), expected(query_x))
    module.eval()
    close(found(query_x), expected(query_x))
    assert metafast.explain(module).path != "fused"


@pytest.mark.parametrize("name", ["pooled first", "untracked", "named", "strided"])
def test_evaluation_by_running_statistics_is_fused(name: str) -> None:
    """With or without a bias, gamma and beta, or statistics to go by; gradients pass through the call."""
    module, (x, y, query_x, query_y) = make(name)
    leaves = [*module.parameters(), x, query_x]
    found = []
    for path in ("fused", "torch.func"):
        module.train()
        adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS, path=path)
        module.eval()
        with RecordOps() as record:
            found.append(with_gradients(adapted(query_x), query_y, "cross_entropy", leaves))
        assert (torch.ops.metafast.conv_forward.default in record.calls) == (path == "fused")
        alone = adapted(query_x[:, :1])  # a query does not see the others, whatever their number
        by_batch = name in ("untracked", "strided")
        if not by_batch:
            close(alone, adapted(query_x)[:, :1])
    close(*found)


@pytest.mark.parametrize("path", ["fused", "torch.func", "loop"])
def test_statistics_of_other_examples(path: str) -> None:
    """Each query by itself, by hand; gradients pass through the statistics."""
    module, (x, y, query_x, query_y) = make("three blocks")
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1, path=path)
    before = {name: buffer.clone() for name, buffer in adapted.buffers.items()}
    out = adapted(query_x, statistics_of=x)
    close(adapted(query_x[:, :1], statistics_of=x), out[:, :1])
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapted.buffers.items())
    outputs = []
    again = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1, path="loop").params
    for task in range(TASKS):
        seen, maps = x[task], query_x[task]
        theta = {name: param[task] for name, param in again.items()}
        for name in ("0.0", "1.0", "2"):
            conv, norm = (f"{name}.weight", f"{name}.bias"), name[:-1] + str(int(name[-1]) + 1)
            seen, maps = (F.conv2d(z, *(theta[part] for part in conv), padding=1) for z in (seen, maps))
            mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
            scale = theta[f"{norm}.weight"] / (var + 1e-5).sqrt()
            shift = theta[f"{norm}.bias"] - mean * scale
            seen, maps = (
                F.max_pool2d((z * scale[:, None, None] + shift[:, None, None]).relu(), 2)
                for z in (seen, maps)
            )
        outputs.append(F.linear(maps.flatten(1), theta["7.weight"], theta["7.bias"]))
    leaves = [*module.parameters(), x, query_x]
    close(*(with_gradients(of, query_y, "cross_entropy", leaves) for of in (out, torch.stack(outputs))))


def test_statistics_of_what_does_not_fit() -> None:
    module, (x, y, query_x, _) = make("three blocks")
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"statistics_of: expected shape \[T, S, ...\] with T = 3, got \[2,"):
        adapted(query_x, statistics_of=x[:2])
    with pytest.raises(
        ValueError, match=r"statistics_of: expected examples \[1, 13, 9\] of .* got \[1, 9, 9\]"
    ):
        adapted(query_x, statistics_of=x[..., :9, :])
    with pytest.raises(TypeError, match="statistics_of: expected a tensor beside a tensor x, got list"):
        adapted(query_x, statistics_of=[x])


def test_one_value_per_channel_is_enough_to_evaluate() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    x, y = torch.randn(2, 4, 1, 3, 3), torch.tensor([0, 1, 2, 0]).expand(2, 4)
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1, path="fused")
    with pytest.raises(ValueError, match="expected more than one value per channel"):
        adapted(x[:, :1])
    module.eval()
    torch.testing.assert_close(adapted(x[:, :1]), adapted(x)[:, :1])


def test_statistics_of_bodies_stay() -> None:
    module, (x, y, query_x, _) = make("three blocks")
    module[0].eval().requires_grad_(False)
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": STEPS}
    found, expected = (metafast.adapt(module, x, y, path=path, **options) for path in ("fused", "torch.func"))
    assert (
        "behind what does not adapt (Conv2d, BatchNorm2d, ReLU, MaxPool2d)" in metafast.explain(module).reason
    )
    close(found.params, expected.params)
    close(dict(sorted(found.buffers.items())), dict(sorted(expected.buffers.items())))
    close(found(query_x), expected(query_x))


def test_a_module_that_changed_runs_as_it_is() -> None:
    module, (x, y, query_x, _) = make("named")
    adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS)
    expected = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS, path="torch.func")
    module.blocks[2].pool = False
    module.blocks[2].norm.eps = 0.5
    module.head.weight.data = module.head.weight.data  # the same tensor: no change
    with pytest.raises(ValueError, match="x: expected examples that the module takes"):
        adapted(query_x)
    module.blocks[2].pool = True
    close(adapted(query_x), expected(query_x))


def test_derivatives() -> None:
    module, (x, y, query_x, _) = make("three blocks")
    weight = next(module.parameters())

    def meta_gradient(path: str) -> Tensor:
        adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1, path=path)
        return torch.autograd.grad(adapted(query_x).square().sum(), weight, create_graph=True)[0]

    with pytest.raises(NotImplementedError, match="derivatives"):
        meta_gradient("fused").sum().backward()
    meta_gradient("torch.func").sum().backward()
    assert weight.grad.abs().sum() > 0


def test_inside_a_transform() -> None:
    module, (x, y, query_x, _) = make("three blocks")

    def total(x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=1)(query_x).square().sum()

    x = x.detach()
    with metafast.trace_doors() as doors:
        found = torch.func.grad(total)(x)
    assert set(doors) == {("conv_inner_sgd", "reference"), ("conv_forward", "reference")}
    x.requires_grad_()
    close(found, torch.autograd.grad(total(x), x)[0])


def test_compile() -> None:
    torch.compiler.reset()
    module, (x, y, query_x, _) = make("three blocks")

    def outputs(x: Tensor, query_x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS)(query_x)

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    weight = module[0][0].weight
    found, expected = (
        [out, *torch.autograd.grad(out.square().sum(), weight)]
        for out in (function(x, query_x) for function in (compiled, outputs))
    )
    close(found, expected)


def test_autocast() -> None:
    module, (x, y, query_x, _) = make("three blocks", dtype=torch.float32)
    expected = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS)
        assert adapted.path == "fused"
        assert adapted(query_x).dtype == torch.float32
    for name, param in adapted.params.items():
        torch.testing.assert_close(param, expected.params[name], rtol=0, atol=0)


def test_pickles_and_copies() -> None:
    module, (x, y, query_x, _) = make("named")
    with torch.no_grad():
        adapted = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.1, steps=STEPS)
        for other in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted)):
            assert other.path == "fused"
            close(other(query_x), adapted(query_x))


# --- what is recognised ---------------------------------------------------------------------------------


def test_explain() -> None:
    lines = str(metafast.explain(conv3())).splitlines()
    assert lines[0] == (
        "fused: metafast.conv_inner_sgd; the kernels know Conv 3x3 1-5, batch norm, ReLU, max-pool 2; "
        "Conv 3x3 5-4, batch norm, ReLU, max-pool 2; Conv 3x3 4-4, batch norm, ReLU, max-pool 2; Linear 4-3"
    )
    assert (
        "Conv 3x5 1-4, batch norm, average-pool 2x1, Tanh; Conv 1x1 4-6, stride 1x2, max-pool 3, ReLU; "
        in (metafast.explain(pooled_first()).reason)
    )
    assert "Conv 3x3 3-4, global average; Linear 4-3" in metafast.explain(without_norm()).reason
    module, (x, *_) = make("named")
    assert "Linear 4-3, as Named.forward runs" in metafast.explain(module, x).reason


def with_layers(*layers: nn.Module, flat: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.Flatten(), nn.Linear(flat, 3))


def by_running() -> nn.Module:
    return with_layers(nn.BatchNorm2d(4).eval())


def twice() -> nn.Module:
    conv = nn.Conv2d(2, 2, 3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), conv, conv, nn.Flatten(), nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (with_layers(nn.GELU()), r"layer '1' \(GELU\) is none of Conv2d, BatchNorm2d, ReLU, Tanh, MaxPool2d"),
        (with_layers(nn.Dropout()), r"layer '1' \(Dropout\) is none of Conv2d"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), r"no Linear follows layer '0' \(Conv2d\)"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4)), r"layer '1' \(Linear\) has maps before it"),
        (nn.Sequential(*with_layers(), nn.ReLU()), r"layer '3' \(ReLU\) follows the last Linear"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)),
            r"layer '1' \(Conv2d\) has groups, a dilation or a padding other than zeros",
        ),
        (with_layers(nn.Conv2d(4, 4, 3, dilation=2)), r"layer '1' \(Conv2d\) has groups, a dilation"),
        (with_layers(nn.Conv2d(4, 4, 3, padding_mode="reflect")), r"layer '1' \(Conv2d\) has groups"),
        (with_layers(nn.Conv2d(4, 4, 2, padding="same")), r"layer '1' \(Conv2d\) pads one side more"),
        (with_layers(nn.ReLU(), nn.BatchNorm2d(4)), r"layer '2' \(BatchNorm2d\) does not follow a Conv2d"),
        (by_running(), r"layer '1' \(BatchNorm2d\) goes by its running statistics"),
        (with_layers(nn.ReLU(), nn.Tanh()), r"layer '2' \(Tanh\) is the second activation behind layer '0'"),
        (with_layers(nn.MaxPool2d(2), nn.MaxPool2d(2)), r"layer '2' \(MaxPool2d\) does not follow .* second"),
        (with_layers(nn.MaxPool2d(2, ceil_mode=True)), r"layer '1' \(MaxPool2d\) has ceil_mode"),
        (with_layers(nn.MaxPool2d(2, dilation=2)), r"layer '1' \(MaxPool2d\) has a dilation"),
        (
            with_layers(nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            r"layer '1' \(AvgPool2d\) has a divisor_override, or does not count the padding",
        ),
        (with_layers(nn.AdaptiveAvgPool2d(2)), r"layer '1' \(AdaptiveAvgPool2d\) has another output than 1"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 3)),
            r"layer '1' \(Flatten\) does not flatten all of an example",
        ),
        (twice(), r"layer '2' \(Conv2d\) shares its weight with a layer before it"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm1d(4))), r"layer '0.1' \(BatchNorm1d\)"),
    ],
    ids=str,
)
def test_what_stands_in_the_way_is_named(module: nn.Module, reason: str) -> None:
    assert metafast.explain(module).path != "fused"
    zeros = torch.zeros(1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match=f"path: expected a module .* but {reason}"):
        metafast.adapt(module, zeros, zeros, loss="mse", lr=0.1, steps=1, path="fused")


def test_all_of_what_adapts_must() -> None:
    module = conv3()
    assert "0.1.weight does not adapt" in metafast.explain(module, params=["0.0", "1", "2", "3", "7"]).reason
    module[1][0].bias.requires_grad_(False)
    assert "1.0.bias does not adapt" in metafast.explain(module).reason


@pytest.mark.parametrize(("kind", "why"), [(Branching, "may branch by them"), (Fixed, "how many examples")])
def test_what_may_be_another_chain_is_not(kind: Make, why: str) -> None:
    explanation = metafast.explain(kind().double(), torch.randn(2, 5, 1, 13, 9, dtype=torch.float64))
    assert explanation.path != "fused"
    assert why in explanation.reason


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 5, 13, 9),
            r"x: expected shape \[T, S, ...\], so that 0.0.weight .* gets \[T, S, C, H, W\], got",
        ),
        (
            (2, 5, 2, 13, 9),
            r"x: expected images of as many channels as 0.0.weight takes, \[5, 1, 3, 3\], got",
        ),
        (
            (2, 5, 1, 16, 9),
            r"x: expected images that give 7.weight the 4 features .* maps there are 4 x 2 x 1",
        ),
        ((2, 5, 1, 7, 9), r"x: expected images that give 7.weight the 4 .* maps there are 4 x 0 x 1"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metafast.adapt(
            conv3(), torch.zeros(shape), torch.zeros(2, 5).long(), loss="cross_entropy", lr=0.1, steps=1
        )


def test_a_channel_of_one_value() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": 1}
    for path in ("fused", "torch.func"):
        with pytest.raises(ValueError, match=r"[Ee]xpected more than (one|1) value per channel"):
            metafast.adapt(module, torch.zeros(2, 1, 1, 3, 3), torch.zeros(2, 1).long(), path=path, **options)


def test_an_image_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"x: expected the dtype of 0.0.weight, torch.float32, got"):
        metafast.adapt(
            conv3(),
            torch.zeros(2, 5, 1, 9, 9).double(),
            torch.zeros(2, 5).long(),
            loss="cross_entropy",
            lr=0.1,
            steps=1,
        )
