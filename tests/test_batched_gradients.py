"""Many gradients at once: is_grads_batched and jacobian(vectorize=True) of the ops that take lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import metafast

T, S = 2, 3


def network() -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4,))]


def examples() -> tuple[Tensor, Tensor]:
    x = torch.randn(T, S, 3, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(T, S, 4, dtype=torch.float64)


def inner_sgd() -> tuple[Tensor, Sequence[Tensor]]:
    params, (x, y) = network(), examples()
    return metafast.inner_sgd(params, x, y, loss="mse", lr=0.1, steps=2)[0], [*params, x]


def maml_loss() -> tuple[Tensor, Sequence[Tensor]]:
    params, (x, y) = network(), examples()
    losses = metafast.maml_loss(params, x, y, x, y, loss="mse", lr=0.1, steps=2, reduction="none")
    return losses, [*params, x]


def adapted() -> tuple[Tensor, Sequence[Tensor]]:
    module, (x, y) = nn.Linear(3, 4).double(), examples()
    outputs = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=2, path="fused")(x)
    return outputs, [*module.parameters(), x]


def adapted_convolutions() -> tuple[Tensor, Sequence[Tensor]]:
    layers = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
    module, (_, y) = nn.Sequential(*layers).double(), examples()
    x = torch.randn(T, S, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    outputs = metafast.adapt(module, x, y, loss="mse", lr=0.1, steps=2, path="fused")(x)
    return outputs, [*module.parameters(), x]


def lstm_unroll() -> tuple[Tensor, Sequence[Tensor]]:
    cell = metafast.CoordinatewiseLSTM(hidden=4, layers=1).double()
    weights = list(cell.parameters())
    grads = [torch.randn(2, 5, dtype=torch.float64)]
    state = metafast.lstm_optimizer_state([grad[0] for grad in grads], hidden=4, layers=1)
    updates, _ = metafast.lstm_optimizer_unroll(grads, state, weights)
    return updates[0], weights


OF = [inner_sgd, maml_loss, adapted, adapted_convolutions, lstm_unroll]


@pytest.mark.parametrize("of", OF, ids=lambda f: f.__name__)
def test_many_gradients_at_once(of: Callable[[], tuple[Tensor, Sequence[Tensor]]]) -> None:
    torch.manual_seed(0)
    outputs, inputs = of()
    grads = torch.randn(3, *outputs.shape, dtype=outputs.dtype)
    found = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(outputs, inputs, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


def test_a_vectorised_jacobian() -> None:
    params, (x, y) = network(), examples()

    def losses(weight: Tensor) -> Tensor:
        of = [weight, params[1].detach()]
        return metafast.maml_loss(of, x, y, x, y, loss="mse", lr=0.1, steps=1, reduction="none")

    one, other = (
        torch.autograd.functional.jacobian(losses, params[0].detach(), vectorize=v) for v in (True, False)
    )
    torch.testing.assert_close(one, other)
