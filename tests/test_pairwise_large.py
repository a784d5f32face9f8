"""Comparisons so large that they go through a matrix product of torch's library (csrc/pairwise/large.h)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

import metafast
from metafast import reference

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
# (T, Q, N, D): every size odd, a task of its own chunks, more chunks than one
SIZES = ((1, 1201, 131, 129), (2, 601, 133, 130))
DTYPES = (torch.float32, torch.float64)


def pair(sizes: tuple[int, ...], dtype: torch.dtype, offset: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Points around `offset`, among them pairs that coincide and pairs that nearly do; a gradient."""
    generator = torch.Generator().manual_seed(0)
    tasks, queries, rows, features = sizes
    x = torch.randn(tasks, queries, features, dtype=dtype, generator=generator) + offset
    y = torch.randn(tasks, rows, features, dtype=dtype, generator=generator) + offset
    y[:, 0] = x[:, 5]
    y[:, 1] = x[:, 6] + 1e-2 / features**0.5
    return x, y, torch.randn(tasks, queries, rows, dtype=dtype, generator=generator)


def results(package: object, tensors: tuple[Tensor, ...], metric: str) -> list[Tensor]:
    x, y, grad = tensors
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    out = package.pairwise_distance(x, y, metric)
    return [out.detach(), *torch.autograd.grad(out, (x, y), grad)]


# Not on the emulator, whose kernels would need minutes for what is left between the products.
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_parity(metric: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, y, grad = pair(sizes, dtype)
    grad[:, 5, 0] = grad[:, 6, 1] = 0  # the direction between points that nearly coincide is ill-conditioned
    found = results(metafast, (x.to(device), y.to(device), grad.to(device)), metric)
    expected = results(reference, (x.double(), y.double(), grad.double()), metric)
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert_close(one / scale, other / scale, dtype)


def by_products(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The definition in less memory than the reference takes."""
    if metric == "dot":
        return -x @ y.mT
    if metric == "cosine":
        return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() if metric == "sqeuclidean" else distance


@pytest.mark.parametrize("metric", METRICS)
def test_products_between_kernels(metric: str, backend: torch.device) -> None:
    """Few pairs of very many features: a GPU takes the library's products for these and their gradients."""
    x, y, grad = (tensor[0] for tensor in pair((1, 1100, 129, 1900), torch.float32))
    y[40] = x[1090] + 0.5  # close to each other beside their norms, and in the last of a kernel's batches
    grad[5, 0] = grad[6, 1] = 0  # as in test_parity
    x, y = (tensor.to(backend).requires_grad_() for tensor in (x, y))
    found = metafast.pairwise_distance(x, y, metric)
    grads = torch.autograd.grad(found, (x, y), grad.to(backend))
    x, y = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, y))
    expected = by_products(x, y, metric)
    near = {"dot": 1e-5, "cosine": 1e-5}.get(metric, 0.0)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4 if near == 0 else 1e-5, atol=near)
    for one, other in zip(grads, torch.autograd.grad(expected, (x, y), grad.double()), strict=True):
        scale = float(other.abs().max())
        assert_close(one.cpu() / scale, other / scale, torch.float32)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_close_pairs_keep_their_digits_between_products(metric: str, backend: torch.device) -> None:
    """Far from the others, where a product has none left, in the first and the last batch of queries."""
    x, y, grad = (tensor[0] for tensor in pair((1, 1100, 129, 1900), torch.float32))
    grad.zero_()
    for query, row in ((7, 3), (1090, 100)):
        x[query] += 1e3
        y[row] = x[query] + 0.1
        grad[query, row] = 1
    x, y = (tensor.to(backend).requires_grad_() for tensor in (x, y))
    found = torch.autograd.grad(metafast.pairwise_distance(x, y, metric), (x, y), grad.to(backend))
    for query, row in ((7, 3), (1090, 100)):
        difference = (x[query].double() - y[row].double()).detach().cpu()
        slope = 2 * difference if metric == "sqeuclidean" else difference / difference.norm()
        torch.testing.assert_close(found[0][query].cpu().double(), slope, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1][row].cpu().double(), -slope, rtol=1e-4, atol=1e-6)


@devices
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_close_pairs_keep_their_digits(metric: str, device: str) -> None:
    x, y, grad = pair(SIZES[0], torch.float32, offset=1e3)
    grad.zero_()[0, 6, 1] = 1
    distance, grad_x, grad_y = results(metafast, (x.to(device), y.to(device), grad.to(device)), metric)
    assert (distance >= 0).all()
    assert distance[0, 5, 0] == 0
    difference = x[0, 6].double() - y[0, 1].double()
    exact = difference.square().sum() if metric == "sqeuclidean" else difference.norm()
    slope = 2 * difference if metric == "sqeuclidean" else difference / exact
    for one, other in ((distance[0, 6, 1], exact), (grad_x[0, 6], slope), (grad_y[0, 1], -slope)):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-2, atol=1e-4 * float(exact))


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_any_number_of_threads(metric: str) -> None:
    tensors = pair(SIZES[0], torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(results(metafast, tensors, metric))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_that_all_tasks_share_and_nan() -> None:
    x, y, _ = pair(SIZES[1], torch.float32)
    shared = metafast.pairwise_distance(x, y[0])
    assert torch.equal(shared[1], metafast.pairwise_distance(x[1], y[0]))
    x[0, 3, 7] = torch.nan
    distance = metafast.pairwise_distance(x, y)
    assert distance[0, 3].isnan().all()
    assert distance[0, 4:].isfinite().all()
    assert distance[1].isfinite().all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_a_distant_row_leaves_the_others_their_digits(metric: str, factor: float) -> None:
    x, y, grad = pair(SIZES[1], torch.float32)
    y[:, -1] *= factor
    grad[..., -1] = grad[:, 5, 0] = grad[:, 6, 1] = 0
    found = results(metafast, (x, y, grad), metric)
    expected = results(reference, (x.double(), y.double(), grad.double()), metric)
    assert_close(found[0][..., 2:-1], expected[0][..., 2:-1], torch.float32)
    for one, other in zip(found[1:], expected[1:], strict=True):
        scale = float(other.abs().max())
        assert_close(one / scale, other / scale, torch.float32)


def test_a_row_that_is_not_finite_is_alone() -> None:
    x, y, _ = pair(SIZES[1], torch.float32)
    clean = metafast.pairwise_distance(x, y)
    y[0, 3, 7] = torch.nan
    distance = metafast.pairwise_distance(x, y)
    assert distance[0, :, 3].isnan().all()
    distance[0, :, 3] = clean[0, :, 3]
    torch.testing.assert_close(distance, clean, rtol=1e-5, atol=1e-3)


def test_second_derivatives() -> None:
    x, y, grad = pair((1, 530, 130, 128), torch.float64)
    grads = []
    for package in (metafast, reference):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        first = torch.autograd.grad(package.pairwise_distance(a, b), (a, b), grad, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), (a, b)))
    scale = float(grads[1][0].abs().max())
    assert_close([g / scale for g in grads[0]], [g / scale for g in grads[1]], torch.float64)
