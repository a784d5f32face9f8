"""adapt, for any module, against a plain loop of torch.autograd.grad over tasks and steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast

TASKS, SHOTS, QUERIES, STEPS = 3, 4, 5, 2
LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Tied(nn.Module):
    """Two layers of one weight, and a buffer that is no statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def nested() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Sequential(layers, nn.Linear(5, 2)), nn.Identity())


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3, affine=False, momentum=0.3),
        nn.GELU(),
        nn.Linear(3, 2),
    )


def embedded() -> nn.Module:
    """A body that the fused path takes, where it does not adapt."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2)
    )


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of an example
    "mlp": (mlp, (3,)),
    "nested": (nested, (2, 3)),
    "conv with batch norm": (conv, (1, 6, 6)),
    "normed": (normed, (1, 6, 6)),
    "embedded": (embedded, (1, 6, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 3)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 3)),
    "attention": (Attention, (5, 4)),
    "tied": (Tied, (3,)),
}


def make(name: str, loss: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    """The module, and support x, support y, query x, query y."""
    torch.manual_seed(0)
    of, shape = MODULES[name]
    module = of().to(dtype)
    outputs = 3 if name == "tied" else 2
    data: list[Tensor] = []
    for count in (SHOTS, QUERIES):
        data.append(torch.randn(TASKS, count, *shape, dtype=dtype).requires_grad_())
        if loss == "cross_entropy":
            data.append(torch.randint(0, outputs, (TASKS, count)))
        else:
            data.append(torch.randn(TASKS, count, outputs, dtype=dtype).requires_grad_())
    return module, data


def plain(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    query_x: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    lr: Sequence[Any],
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Each task's outputs for its queries, and its buffers; `lr` is one for each parameter that adapts."""
    functional_call = sdpa_kernel(SDPBackend.MATH)(torch.func.functional_call)
    outputs, buffers_of_tasks = [], []
    for t in range(len(x)):
        theta = {n: p for n, p in module.named_parameters() if names is None or n in names}
        buffers = dict(module.named_buffers())
        momenta: list[Tensor] | None = None
        for _ in range(STEPS):
            buffers = {n: b.clone() for n, b in buffers.items()}
            value = loss(functional_call(module, {**theta, **buffers}, (x[t],)), y[t])
            grads = torch.autograd.grad(value, list(theta.values()), create_graph=not first_order)
            grads = [g + weight_decay * p for g, p in zip(grads, theta.values(), strict=True)]
            momenta = (
                grads if momenta is None else [momentum * m + g for m, g in zip(momenta, grads, strict=True)]
            )
            moves = [g + momentum * m for g, m in zip(grads, momenta, strict=True)] if nesterov else momenta
            theta = {n: p - r * g for (n, p), r, g in zip(theta.items(), lr, moves, strict=True)}
        buffers_of_tasks.append(buffers)
        copies = {n: b.clone() for n, b in buffers.items()}
        outputs.append(functional_call(module, {**theta, **copies}, (query_x[t],)))
    return torch.stack(outputs), buffers_of_tasks


def with_gradients(outputs: Tensor, query_y: Tensor, loss: str, leaves: Sequence[Tensor]) -> list[Tensor]:
    flat = outputs.flatten(0, 1), query_y.flatten(0, 1)
    grads = torch.autograd.grad(LOSSES[loss](*flat), leaves, allow_unused=True)
    return [outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODULES)
def test_adapted_outputs_and_meta_gradients(
    name: str, loss: str, first_order: bool, fused: bool | None
) -> None:
    module, (x, y, query_x, query_y) = make(name, loss)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = [*module.parameters(), lr, query_x, *([] if first_order else [x])]
    options = {"first_order": first_order, "momentum": 0.6}
    adapted = metafast.adapt(module, x, y, loss=loss, lr=lr, steps=STEPS, fused=fused, **options)
    rates = [lr] * len(list(module.parameters()))
    expected, _ = plain(module, x, y, query_x, loss=LOSSES[loss], lr=rates, **options)
    assert adapted.path == ("fused" if name in ("mlp", "nested") and fused is None else "torch.func")
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, loss, leaves),
        with_gradients(expected, query_y, loss, leaves),
    )


@pytest.mark.parametrize("given", ["sequence", "dict", "numbers"])
@pytest.mark.parametrize("name", ["mlp", "conv with batch norm"])
def test_a_rate_for_each_parameter(name: str, given: str) -> None:
    module, (x, y, query_x, query_y) = make(name, "mse")
    names = [n for n, _ in module.named_parameters()]
    rates: list[Any] = [(0.1 * torch.rand_like(p)).requires_grad_() for p in module.parameters()]
    if given == "numbers":
        rates = [0.01 * (i + 1) for i in range(len(rates))]
    lr = dict(zip(reversed(names), reversed(rates), strict=True)) if given == "dict" else rates
    leaves = [*module.parameters(), *(r for r in rates if isinstance(r, Tensor))]
    adapted = metafast.adapt(module, x, y, loss="mse", lr=lr, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=rates)
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


def test_a_rate_for_each_step_and_layer() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    lr = torch.full((STEPS, 3), 0.1, dtype=torch.float64)
    one, other = (
        metafast.adapt(module, x, y, loss="mse", lr=rate, steps=STEPS)(query_x) for rate in (lr, 0.1)
    )
    torch.testing.assert_close(one, other)


def test_weight_decay_and_nesterov() -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")
    options = {"momentum": 0.7, "weight_decay": 0.2, "nesterov": True}
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, **options)
    assert adapted.path == "torch.func"
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6, **options)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("how", ["a name and a prefix", "frozen"])
def test_only_the_head_adapts(how: str, fused: bool | None) -> None:
    module, (x, y, query_x, query_y) = make("embedded", "cross_entropy")
    names = ["3.weight", "3.bias", "5.weight", "5.bias"]
    params = ["3.weight", "3.bias", "5"] if how == "a name and a prefix" else None
    if params is None:
        module[0].requires_grad_(False)
    adapted = metafast.adapt(
        module, x, y, loss="cross_entropy", lr=0.3, steps=STEPS, params=params, fused=fused
    )
    assert adapted.path == ("fused" if fused is None else "torch.func")
    assert list(adapted.params) == names
    expected, _ = plain(module, x, y, query_x, loss=F.cross_entropy, lr=[0.3] * 4, names=names)
    leaves = [*(p for p in module.parameters() if p.requires_grad), x, query_x]  # also of the body
    found, wanted = (
        with_gradients(out, query_y, "cross_entropy", leaves) for out in (adapted(query_x), expected)
    )
    torch.testing.assert_close(found, wanted)


def test_batch_norm_statistics() -> None:
    module, (x, y, query_x, _) = make("conv with batch norm", "mse")
    before = {name: b.clone() for name, b in module.named_buffers()}
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    _, buffers = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6)
    for name, found in adapted.buffers.items():
        torch.testing.assert_close(found, torch.stack([b[name] for b in buffers]))
    assert adapted.buffers["1.num_batches_tracked"].tolist() == [STEPS] * TASKS
    after = {name: b.clone() for name, b in adapted.buffers.items()}
    module.eval()
    out = adapted(query_x)  # by each task's own statistics
    module.train()
    adapted(query_x)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    assert all(torch.equal(b, after[name]) for name, b in adapted.buffers.items())
    module.eval()
    parts = [
        torch.func.functional_call(
            module, {n: p[t] for n, p in {**adapted.params, **adapted.buffers}.items()}, (query_x[t],)
        )
        for t in range(TASKS)
    ]
    torch.testing.assert_close(out, torch.stack(parts))


def test_dropout_is_drawn_for_each_task() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    x = torch.randn(1, SHOTS, 3).expand(TASKS, -1, -1)
    adapted = metafast.adapt(module, x, torch.zeros(TASKS, SHOTS, 2), loss="mse", lr=0.1, steps=1)
    assert not torch.equal(adapted.params["0.weight"][0], adapted.params["0.weight"][1])
    module.eval()
    adapted = metafast.adapt(module, x, torch.zeros(TASKS, SHOTS, 2), loss="mse", lr=0.1, steps=1)
    torch.testing.assert_close(adapted.params["0.weight"][0], adapted.params["0.weight"][1])


def test_a_function_as_loss() -> None:
    module, (x, y, query_x, query_y) = make("mlp", "mse")

    def huber(out: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(out, y, delta=0.3)

    adapted = metafast.adapt(module, x, y, loss=huber, lr=0.1, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=huber, lr=[0.1] * 6)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        with_gradients(adapted(query_x), query_y, "mse", leaves),
        with_gradients(expected, query_y, "mse", leaves),
    )


@pytest.mark.parametrize("fused", [None, False])
def test_labels_that_are_left_out(fused: bool | None) -> None:
    module, (x, y, query_x, _) = make("mlp", "cross_entropy")
    y[0] = -100
    y[1, 2:] = -100
    out = metafast.adapt(module, x, y, loss="cross_entropy", lr=0.5, steps=STEPS, fused=fused)(query_x)
    torch.testing.assert_close(out[0], module(query_x[0]))
    alone = metafast.adapt(module, x[1:2, :2], y[1:2, :2], loss="cross_entropy", lr=0.5, steps=STEPS)
    torch.testing.assert_close(out[1:2], alone(query_x[1:2]))


@pytest.mark.parametrize("name", ["mlp", "conv with batch norm", "normed", "LSTM", "attention"])
def test_higher_derivatives(name: str) -> None:
    """Against finite differences: the third derivatives of torch's own norms are wrong."""
    module, (x, y, query_x, _) = make(name, "mse")
    first = next(module.parameters())
    direction, step = torch.randn_like(first), 1e-5

    def meta_gradient(create_graph: bool = False) -> Tensor:
        out = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, fused=False)(query_x)
        return torch.autograd.grad(out.square().sum(), first, create_graph=create_graph)[0]

    (exact,) = torch.autograd.grad((meta_gradient(create_graph=True) * direction).sum(), first)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            first += sign * step * direction
        ends.append(meta_gradient())
        with torch.no_grad():
            first -= sign * step * direction
    torch.testing.assert_close(exact, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_fused_is_differentiable_once() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    out = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, fused=True)(query_x)
    (grad,) = torch.autograd.grad(out.square().sum(), module[0].weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("fused", [None, False])
def test_no_steps(fused: bool | None) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=0, fused=fused)
    torch.testing.assert_close(adapted(query_x), torch.stack([module(task) for task in query_x]))


def test_no_tasks() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    adapted = metafast.adapt(module, x[:0], y[:0], loss="mse", lr=0.1, steps=1)
    assert adapted(query_x[:0]).shape == (0, QUERIES, 2)
    with pytest.raises(ValueError, match="x: expected a task or more, got none"):
        metafast.adapt(module, x[:0], y[:0], loss="mse", lr=0.1, steps=1, fused=False)


@pytest.mark.parametrize(
    ("name", "fused"), [("mlp", True), ("embedded", None), ("mlp", False), ("conv with batch norm", None)]
)
def test_compile(name: str, fused: bool | None) -> None:
    torch.compiler.reset()
    module, (x, y, query_x, _) = make(name, "mse")

    def outputs(x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, fused=fused)(query_x)

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    weight = module[0].weight
    found, expected = (
        [out, *torch.autograd.grad(out.square().sum(), weight)]
        for out in (function(x, y, query_x) for function in (compiled, outputs))
    )
    torch.testing.assert_close(found, expected)


def test_inside_a_transform() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")

    def total(x: Tensor) -> Tensor:
        return metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)(query_x).square().sum()

    torch.testing.assert_close(torch.func.grad(total)(x), torch.autograd.grad(total(x), x)[0])


@pytest.mark.parametrize("fused", [True, False])
def test_autocast(fused: bool) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse", torch.float32)
    expected = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, fused=fused)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, fused=fused)
        assert adapted(query_x).dtype == (torch.bfloat16 if fused else torch.float32)  # vmap holds it off
    for name, param in adapted.params.items():
        assert param.dtype == torch.float32
        # The fused path adapts in float32 whether or not autocast is on.
        tolerance = 0.0 if fused else 2e-2
        torch.testing.assert_close(param, expected.params[name], rtol=tolerance, atol=tolerance)


def test_half_precision_is_refused() -> None:
    module, (x, y, *_) = make("mlp", "mse", torch.bfloat16)
    message = "module: expected parameters of dtype float32 or float64, got torch.bfloat16 in 0.weight"
    with pytest.raises(TypeError, match=message):
        metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)


# --- explain --------------------------------------------------------------------------------------------


def called(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    return layer


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (conv(), r"layer '0' \(Conv2d\) is no Linear, nor a single ReLU, Tanh or Identity between two"),
        (Recurrent(nn.GRU), r"the module \(Recurrent\) is no Linear"),
        (nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1)), r"layer '1' \(GELU\) is no Linear"),
        (nn.Sequential(nn.Linear(2, 3, bias=False)), r"layer '0' \(Linear\) has no bias"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), r"layer '1' \(ReLU\) follows the last Linear"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)),
            "its activations differ: relu, tanh",
        ),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.ReLU(), nn.Linear(3, 3)), r"layer '2' \(ReLU\) is no"),
        (nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))), "it has 9 Linear layers, more than 8"),
        (
            nn.Sequential(*[nn.Linear(2, 2)] * 2),
            r"layer '1' \(Linear\) shares its weight with a layer before",
        ),
        (nn.Sequential(called(nn.Linear(2, 2))), r"layer '0' \(Linear\) has hooks"),
        (called(nn.Sequential(nn.Linear(2, 2))), r"the module \(Sequential\) has hooks"),
        (nn.Sequential(replaced(nn.Linear(2, 2))), r"layer '0' \(Linear\) has a forward of its own"),
        (replaced(nn.Sequential(nn.Linear(2, 2))), r"the module \(Sequential\) has a forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), r"the module \(ParametrizedLinear\) is no"),
        (
            nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2)),
            r"layer '0' \(Dropout\) stands before what adapts, and may not give the same twice",
        ),
    ],
    ids=str,
)
def test_explain_names_what_the_kernels_do_not_know(module: nn.Module, reason: str) -> None:
    explanation = metafast.explain(module, loss="mse")
    assert explanation.path == "torch.func"
    with pytest.raises(ValueError, match=f"fused: expected a module .* but {reason}"):
        metafast.adapt(
            module, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), loss="mse", lr=0.1, steps=1, fused=True
        )


@pytest.mark.parametrize("layer", [0, 1], ids=["Linear", "Tanh"])
def test_a_forward_of_its_own_is_run(layer: int) -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    replaced(module[layer])
    adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
    expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6)
    torch.testing.assert_close(adapted(query_x), expected)


def test_hooks_of_all_modules_are_run() -> None:
    module, (x, y, query_x, _) = make("mlp", "mse")
    with nn.modules.module.register_module_forward_hook(lambda layer, args, out: 2 * out):
        assert metafast.explain(module, loss="mse").reason == "torch has hooks for all modules"
        adapted = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS)
        expected, _ = plain(module, x, y, query_x, loss=F.mse_loss, lr=[0.1] * 6)
        torch.testing.assert_close(adapted(query_x), expected)
    assert metafast.explain(module, loss="mse").path == "fused"


def test_explain() -> None:
    module = embedded()
    explanation = metafast.explain(module, params="5")
    assert explanation.path == "fused"
    assert explanation.adapts == {"5.weight": (2, 4), "5.bias": (2,)}
    assert explanation.shares == ("0.weight", "0.bias", "3.weight", "3.bias")
    assert str(explanation).splitlines() == [
        "fused: metafast.inner_sgd; the kernels know Linear 4-2, behind what does not adapt "
        "(Conv2d, Tanh, Flatten, Linear, ReLU)",
        "  adapts 5.weight [2, 4]",
        "  adapts 5.bias [2]",
        "  shares 0.weight",
        "  shares 0.bias",
        "  shares 3.weight",
        "  shares 3.bias",
    ]
    assert metafast.explain(mlp()).reason == "the kernels know Linear 3-6-5-2, tanh"
    assert metafast.explain(mlp(), loss=F.mse_loss).reason == "the loss is a function of the caller"
    assert metafast.explain(mlp(), weight_decay=0.1).reason == "the kernels have no weight_decay"
    assert metafast.explain(mlp(), nesterov=True).reason == "the kernels have no nesterov"
    assert metafast.explain(mlp(), torch.zeros(2, 3, 4, 3)).path == "torch.func"
    assert "5.bias does not adapt" in metafast.explain(module, params=["5.weight"]).reason


def test_an_input_of_more_dimensions_takes_the_general_path() -> None:
    module = mlp()
    x = torch.randn(TASKS, SHOTS, 7, 3)
    adapted = metafast.adapt(module, x, torch.zeros(TASKS, SHOTS, 7, 2), loss="mse", lr=0.1, steps=1)
    assert adapted.path == "torch.func"
    flat = metafast.adapt(
        module, x.flatten(1, 2), torch.zeros(TASKS, SHOTS * 7, 2), loss="mse", lr=0.1, steps=1
    )
    torch.testing.assert_close(adapted(x).flatten(1, 2), flat(x.flatten(1, 2)))


def test_repr() -> None:
    module, (x, y, *_) = make("mlp", "mse")
    adapted = metafast.adapt(module[:1], x, y.new_zeros(TASKS, SHOTS, 6), loss="mse", lr=0.1, steps=1)
    assert repr(adapted) == "Adapted(fused: 0.weight [3, 6, 3], 0.bias [3, 6])"


@pytest.mark.parametrize(("name", "params"), [("embedded", "5"), ("conv with batch norm", None)])
def test_pickles_and_copies(name: str, params: str | None) -> None:
    module, (x, y, query_x, _) = make(name, "mse")
    pickled = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, params=params)
    with torch.no_grad():
        copied = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=STEPS, params=params)
        expected = copied(query_x)
        others = [pickle.loads(pickle.dumps(pickled)), copy.deepcopy(copied)]
        for tensor in (*module.parameters(), *copied.params.values(), *copied.buffers.values()):
            tensor.zero_()
    for other in others:
        assert other.path == pickled.path
        torch.testing.assert_close(other(query_x), expected, rtol=0, atol=0)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss: expected 'mse', 'cross_entropy' or a function, got 'hinge'"),
        ({"loss": 3}, "loss: expected 'mse', 'cross_entropy' or a function, got 3"),
        ({"steps": -1}, "steps: expected a number >= 0, got -1"),
        ({"x": torch.zeros(3)}, r"x: expected shape \[T, S, ...\], got \[3\]"),
        ({"y": torch.zeros(2, 4, 2)}, r"y: expected shape \[T, S, ...\] with T = 3, got \[2, 4, 2\]"),
        ({"y": torch.zeros(3, 4, 1)}, r"y: expected .*\[.*2\], got \[.*1\]"),
        (
            {"params": "head"},
            "params: expected names of parameters that require grad, or prefixes, got 'head'",
        ),
        ({"lr": [0.1, 0.1]}, "lr: expected one for each of 0.weight, .*, got 2"),
        ({"lr": {"0.weight": 0.1}}, "lr: expected one for each of .*; check 0.bias, 2.bias"),
        (
            {"lr": [torch.zeros(7)] * 6},
            r"lr: expected for 0.weight what broadcasts to its shape, \[6, 3\], got \[7\]",
        ),
        ({"lr": torch.zeros(2)}, "lr: expected"),
        ({"lr": -0.1}, r"lr: expected a number >= 0, got -0.1"),
        ({"lr": [0.1, -0.1] * 3}, r"lr: expected a number >= 0, got -0.1"),
        ({"momentum": -1}, "momentum: expected a number >= 0, got -1"),
        ({"weight_decay": -1}, "weight_decay: expected a number >= 0, got -1"),
        ({"x": torch.zeros(3, 4, 7)}, r"x: expected .*7"),
        ({"x": torch.zeros(3, 4, 3).double()}, "x: expected .*"),
        (
            {"loss": "cross_entropy", "y": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 2, -100]])},
            r"y: expected classes in \[0, 2\) or -100 \(ignored\), got 2 at position 2 of task 2",
        ),
        (
            {"loss": "cross_entropy", "y": torch.zeros(3, 5, dtype=torch.int64)},
            r"y: expected .*\[.*\], got \[.*5\]",
        ),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str, fused: bool | None) -> None:
    args = {
        "x": torch.zeros(3, 4, 3),
        "y": torch.zeros(3, 4, 2),
        "loss": "mse",
        "lr": 0.1,
        "steps": 1,
        **change,
    }
    kind = TypeError if args["x"].dtype == torch.float64 and fused is None else ValueError
    with pytest.raises(kind, match=message):
        metafast.adapt(mlp(), fused=fused, **args)


def test_float_labels_are_no_labels() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4)
    for fused in (None, False):
        with pytest.raises(TypeError, match="y: expected a tensor of dtype int64, got"):
            metafast.adapt(mlp(), x, y, loss="cross_entropy", lr=0.1, steps=1, fused=fused)


def test_an_adapted_module_names_what_it_cannot_take() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4, 2)
    adapted = metafast.adapt(mlp(), x, y, loss="mse", lr=0.1, steps=1, fused=False)
    with pytest.raises(ValueError, match=r"x: expected examples that the module takes; .*\[4, 7\] of"):
        adapted(torch.zeros(3, 4, 7))


def test_bad_modules_and_losses() -> None:
    x, y = torch.zeros(3, 4, 3), torch.zeros(3, 4, 2)
    with pytest.raises(
        ValueError, match="module: expected a parameter that requires grad and adapts, got none"
    ):
        metafast.adapt(nn.Tanh(), x, y, loss="mse", lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"loss: expected a function that returns a scalar, got \[4, 2\]"):
        metafast.adapt(mlp(), x, y, loss=lambda out, y: (out - y).square(), lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"y: expected classes in \[0, 2\)"):
        metafast.adapt(mlp(), x, torch.full((3, 4), 2), loss="cross_entropy", lr=0.1, steps=1)


def test_a_layer_that_runs_twice_stays_in_its_module() -> None:
    shared = nn.Linear(3, 3)
    network, weight = nn.Sequential(shared, nn.Tanh(), shared), shared.weight
    x = torch.randn(2, 5, 3)
    adapted = metafast.adapt(network, x, x, loss="mse", lr=0.1, steps=2)
    assert shared.weight is weight
    (expected,) = torch.autograd.grad(F.mse_loss(network(x[0]), x[0]), [weight])
    one = metafast.adapt(network, x, x, loss="mse", lr=0.1, steps=1)
    torch.testing.assert_close(one.params["0.weight"][0], weight - 0.1 * expected)
    assert adapted(x).shape == x.shape
