"""Norms in the place of torch's, by its kernels or by elementary operations: to the third derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metafast.adaptation.functions import Exact


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["batch", "batch, evaluation", "instance", "layer"])
def test_norms(kind: str, affine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    module = {"batch": nn.BatchNorm1d, "instance": nn.InstanceNorm1d}.get(kind.partition(",")[0])
    if module is None:
        layer = nn.LayerNorm((2, 4), elementwise_affine=affine).double()
    else:
        layer = module(2, affine=affine, track_running_stats=True).double().train("," not in kind)
    weights = [p.detach().add(0.3).requires_grad_() for p in layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]
    buffers = dict(layer.named_buffers())

    def run(x: Tensor, *weights: Tensor, exact: bool = True, kept: Any = None) -> Tensor:
        kept = {n: b.clone() for n, b in buffers.items()} if kept is None else kept
        tensors = {**dict(zip(names, weights, strict=True)), **kept}
        with Exact({}) if exact else torch.enable_grad():
            return torch.func.functional_call(layer, tensors, (x,))

    seen, own = ({n: b.clone() for n, b in buffers.items()} for _ in range(2))
    torch.testing.assert_close(run(x, *weights, kept=seen), run(x, *weights, exact=False, kept=own))
    torch.testing.assert_close(seen, own)
    inputs = (x, *weights)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*inputs).pow(3).sum(), inputs, create_graph=True)

    assert gradgradcheck(gradients, inputs)
