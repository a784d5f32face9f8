"""explain, and what adapt says of what it cannot take."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapt_problems import SHOTS, STEPS, TASKS, Recurrent, embedded, make, mlp, plain
from torch import nn

import metafast

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
        (
            Recurrent(nn.GRU),
            r"the module \(Recurrent\) is no nn.Sequential, and layer 'cell' \(GRU\) is part of it",
        ),
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
    assert explanation.path != "fused"
    with pytest.raises(ValueError, match=f"path: expected a module .* but {reason}"):
        metafast.adapt(
            module, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), loss="mse", lr=0.1, steps=1, path="fused"
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
        assert metafast.explain(module, loss="mse").reason.startswith("torch has hooks for all modules")
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
    assert metafast.explain(mlp(), loss=F.mse_loss).reason.startswith("the loss is a function of")
    assert metafast.explain(mlp(), weight_decay=0.1).reason.startswith("the kernels have no weight_decay")
    assert metafast.explain(mlp(), nesterov=True).reason.startswith("the kernels have no nesterov")
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


@pytest.mark.parametrize(
    ("module", "tasks", "path", "why"),
    [
        (
            nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)),
            4,
            "torch.func",
            "many small operations",
        ),
        (nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), 1, "loop", "one task needs no batch"),
        (
            nn.Sequential(nn.Linear(3, 60_000), nn.GELU(), nn.Linear(60_000, 1)),
            2,
            "loop",
            "300001 parameters",
        ),
        (
            nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten()),
            2,
            "loop",
            "a CPU convolves with one task",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Flatten()),
            2,
            "loop",
            "a CPU convolves with one task",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten()),
            2,
            "torch.func",
            "many small operations",
        ),
        (nn.Sequential(nn.Conv2d(3, 700, 3), nn.GELU(), nn.Flatten()), 2, "loop", "of up to 35000 numbers"),
    ],
    ids=["small", "one task", "large", "other convolutions", "dilation", "small maps", "large maps"],
)
def test_the_path_by_what_was_measured(module: nn.Module, tasks: int, path: str, why: str) -> None:
    shape = {nn.Linear: (3,), nn.Conv1d: (3, 5), nn.Conv2d: (3, 5, 5)}[type(module[0])]
    x = torch.randn(tasks, 2, *shape)
    explanation = metafast.explain(module, x)
    assert explanation.path == path
    assert why in explanation.reason
    adapted = metafast.adapt(
        module, x, x.flatten(2)[..., :1] * 0, loss=lambda out, y: out.mean(), lr=0.1, steps=1
    )
    assert adapted.path == path
