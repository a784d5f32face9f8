"""Prototypical Networks over the fused operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metafast import reference
from metafast.data import Episodes
from metafast.methods import ProtoNet, conv4


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
    log_probs = method.log_probs(drawn)
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
