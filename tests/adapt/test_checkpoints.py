"""Steps that run again in the backward: the numbers of those that keep their graph, without its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast

PATHS = ["torch.func", "loop"]
STEPS, TASKS, SHOTS = 3, 2, 6
DOUBLE = {"dtype": torch.float64}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3)).double()


def data(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, query_x = torch.randn(*lead, SHOTS, 1, 4, 4, **DOUBLE), torch.randn(TASKS, 5, 1, 4, 4, **DOUBLE)
    return x.requires_grad_(), torch.randint(0, 3, (*lead, SHOTS)), query_x


def rates(kind: str, module: nn.Module) -> Any:
    if kind == "number":
        return 0.1
    if kind == "tensor":
        return torch.tensor(0.1, **DOUBLE).requires_grad_()
    if kind == "of steps and layers":
        return (0.1 * torch.rand(STEPS, 3, **DOUBLE)).requires_grad_()
    return [(0.1 * torch.rand(p.shape, **DOUBLE)).requires_grad_() for p in module.parameters()]


CASES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.01},
    "a rate that is learned": {"lr": "tensor", "momentum": 0.5},
    "a rate for each step and layer": {"lr": "of steps and layers"},
    "a rate for each element": {"lr": "of elements", "momentum": 0.5},
    "a batch for each step": {"per_step": True},
    "a head that adapts": {"params": "5"},
    "weights of examples": {"example_weights": True},
    "a clipped gradient": {"max_norm": 0.2},
    "a proximal term": {
        "penalty": lambda theta, start: 0.1 * sum((theta[n] - start[n]).square().sum() for n in theta)
    },
    "first order": {"first_order": True},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str, path: str) -> None:
    """Values, gradients and running statistics, with dropout; and the derivatives of the gradients."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for checkpoint_steps in (False, True):
        module, options = network(), dict(CASES[name])
        x, y, query_x = data(STEPS, TASKS) if options.get("per_step") else data(TASKS)
        lr = rates(options.pop("lr", "number"), module)
        leaves = [
            *module.parameters(),
            x,
            *(t for t in ([lr], lr)[isinstance(lr, list)] if isinstance(t, Tensor)),
        ]
        if options.get("example_weights"):
            options["example_weights"] = torch.rand(TASKS, SHOTS, **DOUBLE).requires_grad_()
            leaves.append(options["example_weights"])
        torch.manual_seed(2)
        adapted = metafast.adapt(
            module,
            x,
            y,
            loss="cross_entropy",
            lr=lr,
            steps=STEPS,
            path=path,
            checkpoint_steps=checkpoint_steps,
            **options,
        )
        value, after = adapted(query_x).sin().sum(), torch.rand(1)
        grads = torch.autograd.grad(
            value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        square = sum(grad.square().sum() for grad in grads)
        second = torch.autograd.grad(square, leaves, allow_unused=True, materialize_grads=True)
        running = [adapted.buffers["1.running_mean"], adapted.buffers["1.num_batches_tracked"]]
        found.append(([value, *grads, *running, after, torch.rand(1)], list(second)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow_with_the_activations_of_all_steps() -> None:
    """On the loop path, whose graph says what it keeps; bench.networks measures both."""

    def kept(steps: int, checkpoint_steps: bool) -> int:
        """Bytes that the graph of the steps holds."""
        total = 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal total
                self.tensor = tensor.detach()
                total += tensor.nbytes

            def __del__(self) -> None:
                nonlocal total
                total -= self.tensor.nbytes

        x, y, _ = data(TASKS)
        options = {"path": "loop", "checkpoint_steps": checkpoint_steps}
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            adapted = metafast.adapt(
                network(), x, y, loss="cross_entropy", lr=0.1, steps=steps, momentum=0.5, **options
            )
            bytes_kept = total
        del adapted
        return bytes_kept

    size = TASKS * sum(t.nbytes for t in [*network().parameters(), *network().buffers()])
    inputs = sum(t.nbytes for t in data(TASKS))
    a_step = kept(3, True) - kept(2, True)
    assert a_step < 3 * size + inputs
    assert kept(3, False) - kept(2, False) > 4 * a_step


@pytest.mark.parametrize("path", PATHS)
def test_autocast_is_that_of_the_step(path: str) -> None:
    """The backward runs outside of it."""
    found = []
    for checkpoint_steps in (False, True):
        module = network().float()
        x, y, query_x = (t.detach().float() if t.is_floating_point() else t for t in data(TASKS))
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            adapted = metafast.adapt(
                module,
                x,
                y,
                loss="cross_entropy",
                lr=0.1,
                steps=STEPS,
                path=path,
                checkpoint_steps=checkpoint_steps,
            )
        found.append(torch.autograd.grad(adapted(query_x).sin().sum(), list(module.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_tensor_of_the_caller_whose_gradient_would_be_lost_is_refused(path: str) -> None:
    x, y, _ = data(TASKS)
    temperature = torch.ones(3, **DOUBLE).requires_grad_()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out * temperature.exp(), y)

    options = {"loss": loss, "lr": 0.1, "steps": 1, "path": path}
    metafast.adapt(network(), x, y, **options)
    with pytest.raises(
        ValueError, match=r"checkpoint_steps: expected a module.* got another, of shape \[3\]"
    ):
        metafast.adapt(network(), x, y, checkpoint_steps=True, **options)


@pytest.mark.parametrize("wrap", [torch.func.grad, torch.vmap], ids=["grad", "vmap"])
def test_transforms_are_refused(wrap: Callable[..., Any]) -> None:
    module, (_, y, query_x) = network(), data(TASKS)

    def value(x: Tensor) -> Tensor:
        options = {"loss": "cross_entropy", "lr": 0.1, "steps": 1, "path": "torch.func"}
        return metafast.adapt(module, x, y, checkpoint_steps=True, **options)(query_x).sum()

    x = torch.randn(TASKS, SHOTS, 1, 4, 4, **DOUBLE)
    with pytest.raises(ValueError, match="checkpoint_steps: expected False in"):
        wrap(value)(x if wrap is torch.func.grad else x.unsqueeze(0))


def test_the_fused_path_keeps_no_more_anyway() -> None:
    module = nn.Sequential(nn.Linear(16, 3))
    x, y = torch.randn(2, 4, 16), torch.randint(0, 3, (2, 4))
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": 2, "path": "fused"}
    one, other = (metafast.adapt(module, x, y, checkpoint_steps=flag, **options)(x) for flag in (False, True))
    assert one.equal(other)
