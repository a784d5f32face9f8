"""What stands beside what: all variants get the same embeddings and have to return the same loss, and with
"forward + backward" the same gradients of support, query and head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import metafast
from bench.common.cases import Case, Skip, Target, Variant
from bench.common.cuda_graph import graphed
from bench.common.in_jax import to_torch
from bench.pairwise.peers import in_jax, libraries, pytorch
from bench.pairwise.peers.pytorch import compiled_call, torch_call
from bench.pairwise.workloads import HIDDEN, Episodes, Size
from metafast import reference

ALL = ("eager", "compiled", "jax", "library")
TORCH_EAGER = Target(4, ("eager",), "the best eager PyTorch")
BEST_OF_ALL = Target(3, ALL)
FLOOR = Target(2)
LARGEST = Size(1024, 20, 5, 512)

Build = Callable[[], Callable[[], object]]
Collect = Callable[[object], Sequence[Tensor]]


def direction(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def ours(build: Build, collect: Collect, device: torch.device) -> list[Variant]:
    variants = [Variant("metafast", "metafast", build, collect)]
    if device.type == "cuda":
        name = "metafast, CUDA graph"
        variants.append(Variant(name, name, lambda: graphed(build()), collect))
    return variants


def prototypical_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    differences = 4 * size.pairs * size.features  # bytes of [T, Q, N, D]

    def build() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return metafast.prototypical_loss(support, e.support_labels, query, e.query_labels, size.way)

        return torch_call(loss, (e.support, e.query), backward)

    def torch_variant(
        name: str, kind: str, logits: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return pytorch.prototypical_loss(logits, support, query, e.query_labels, size.way)

        return Variant(
            name, kind, lambda: call(loss, (e.support, e.query), backward), e.collect, None, peak_bytes
        )

    def jax() -> Callable[[], object]:
        tensors = (e.support, e.query)
        return in_jax.jitted(
            device, in_jax.prototypical_loss, tensors, backward, labels=e.query_labels, way=size.way
        )

    def easyfsl() -> Callable[[], object]:
        return libraries.episode_loop(libraries.easyfsl_prototypical_loss(), e, e.query_labels, (), backward)

    def pml() -> Callable[[], object]:
        distance = libraries.pml_sqeuclidean()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(-distance(query, pytorch.class_means(support, size.way)), labels)

        return libraries.episode_loop(loss, e, e.query_labels, (), backward)

    def expected(metric: str | None) -> list[Tensor]:
        def loss(support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
            return reference.prototypical_loss(
                support,
                labels,
                query,
                query_labels,
                size.way,
                metric=metric or "sqeuclidean",
                reduction="sum",
            )

        return e.expected(loss, e.query_labels, (), backward)

    held = differences * (4.5 if backward else 2)
    variants = [
        *ours(build, e.collect, device),
        torch_variant("eager bmm without |q|^2", "eager", pytorch.logits_bmm_without_query_norm, torch_call),
        Variant("JAX jit einsum", "jax", jax, lambda r: e.collect(to_torch(r))),
        torch_variant("compiled bmm", "compiled", pytorch.logits_bmm_without_query_norm, compiled_call),
        torch_variant("eager bmm", "eager", pytorch.logits_bmm, torch_call),
        torch_variant("eager torch.cdist", "eager", pytorch.logits_cdist, torch_call),
        torch_variant("eager broadcasting", "eager", pytorch.logits_broadcasting, torch_call, held),
        torch_variant("compiled broadcasting", "compiled", pytorch.logits_broadcasting, compiled_call),
        Variant("easyfsl, euclidean", "library", easyfsl, libraries.loop_collect(e), "euclidean"),
        Variant("pytorch-metric-learning", "library", pml, libraries.loop_collect(e)),
    ]
    flops, traffic = size.prototypical_flops(backward), size.traffic(backward)
    name = f"prototypical_loss {size}, {direction(backward)}"
    return Case(name, variants, flops, traffic, functools.cache(expected), targets)


def matching_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)

    def build() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return metafast.matching_loss(support, e.support_labels, query, e.query_labels, size.way)

        return torch_call(loss, (e.support, e.query), backward)

    def torch_variant(
        name: str, kind: str, cosine: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return pytorch.matching_loss(cosine, support, query, e.query_labels, size.way)

        return Variant(
            name, kind, lambda: call(loss, (e.support, e.query), backward), e.collect, None, peak_bytes
        )

    def jax() -> Callable[[], object]:
        tensors = (e.support, e.query)
        return in_jax.jitted(
            device, in_jax.matching_loss, tensors, backward, labels=e.query_labels, way=size.way
        )

    def easyfsl() -> Callable[[], object]:
        raise Skip("its MatchingNetworks always runs LSTM encoders: another computation")

    def pml() -> Callable[[], object]:
        cosine = libraries.pml_cosine()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return pytorch.matching_loss(cosine, support, query, labels, size.way)

        return libraries.episode_loop(loss, e, e.query_labels, (), backward)

    def expected(_: str | None) -> list[Tensor]:
        def loss(support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
            return reference.matching_loss(support, labels, query, query_labels, size.way, reduction="sum")

        return e.expected(loss, e.query_labels, (), backward)

    products = 4 * size.tasks * size.queries * size.support * size.features  # bytes of [T, Q, S, D]
    variants = [
        *ours(build, e.collect, device),
        torch_variant("eager bmm", "eager", pytorch.cosine_bmm, torch_call),
        Variant("JAX jit einsum", "jax", jax, lambda r: e.collect(to_torch(r))),
        torch_variant("compiled bmm", "compiled", pytorch.cosine_bmm, compiled_call),
        torch_variant(
            "eager F.cosine_similarity",
            "eager",
            pytorch.cosine_broadcasting,
            torch_call,
            5 * products,
        ),
        Variant("easyfsl", "library", easyfsl, e.collect),
        Variant("pytorch-metric-learning", "library", pml, libraries.loop_collect(e)),
    ]
    flops, traffic = size.matching_flops(backward), size.traffic(backward)
    return Case(
        f"matching_loss {size}, {direction(backward)}",
        variants,
        flops,
        traffic,
        functools.cache(expected),
        targets,
    )


def relation_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    head = e.head()
    tensors = (e.support, e.query, *head)

    def build() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor, *head: Tensor) -> Tensor:
            rows = metafast.prototypes(support, e.support_labels, size.way)
            return F.mse_loss(metafast.relation_scores(query, rows, *head), e.targets)

        return torch_call(loss, tensors, backward)

    def torch_variant(
        name: str, kind: str, scores: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(*tensors: Tensor) -> Tensor:
            return pytorch.relation_loss(scores, *tensors, targets=e.targets, way=size.way)

        return Variant(name, kind, lambda: call(loss, tensors, backward), e.collect, None, peak_bytes)

    def jax() -> Callable[[], object]:
        return in_jax.jitted(device, in_jax.relation_loss, tensors, backward, targets=e.targets, way=size.way)

    def easyfsl() -> Callable[[], object]:
        loss, parameters = libraries.easyfsl_relation_loss(head)
        return libraries.episode_loop(loss, e, e.targets, parameters, backward)

    def easyfsl_collect(results: object) -> list[Tensor]:
        collected = libraries.loop_collect(e)(results)
        if backward:
            collected[3] = collected[3].roll(size.features, 1)  # back to [query; prototype]
        return collected

    def expected(_: str | None) -> list[Tensor]:
        def loss(support: Tensor, labels: Tensor, query: Tensor, target: Tensor, *head: Tensor) -> Tensor:
            rows = reference.prototypes(support, labels, size.way)
            return (reference.relation_scores(query, rows, *head) - target).square().sum()

        return e.expected(loss, e.targets, head, backward)

    concatenated = 8 * size.pairs * size.features  # bytes of [T, Q, N, 2 D]
    hidden = 4 * size.pairs * HIDDEN
    variants = [
        *ours(build, e.collect, device),
        torch_variant("eager split", "eager", pytorch.relation_scores_split, torch_call, 6 * hidden),
        Variant("JAX jit split", "jax", jax, lambda r: e.collect(to_torch(r))),
        torch_variant("compiled split", "compiled", pytorch.relation_scores_split, compiled_call, 6 * hidden),
        torch_variant(
            "eager concatenation",
            "library",
            pytorch.relation_scores_concatenated,
            torch_call,
            3 * concatenated + 6 * hidden,
        ),
        Variant("easyfsl (concatenates)", "library", easyfsl, easyfsl_collect),
    ]
    name = f"relation head {size} H={HIDDEN}, {direction(backward)}"
    flops, traffic = size.relation_flops(backward), size.traffic(backward)
    return Case(name, variants, flops, traffic, functools.cache(expected), targets)


def distance_case(
    queries: int, rows: int, features: int, device: torch.device, backward: bool, targets: Sequence[Target]
) -> Case:
    x, y = torch.randn(queries, features, device=device), torch.randn(rows, features, device=device)
    grad = torch.randn(queries, rows, device=device)

    def collect(result: Sequence[Tensor]) -> list[Tensor]:
        out, *grads = result
        return [out[:64], *(g[:k] for g, k in zip(grads, (64, 8), strict=False))]

    def jax_collect(result: object) -> list[Tensor]:
        return collect(to_torch(result))

    def build() -> Callable[[], tuple[Tensor, ...]]:
        return torch_call(metafast.pairwise_distance, (x, y), backward, grad)

    def torch_variant(
        name: str, kind: str, function: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        return Variant(name, kind, lambda: call(function, (x, y), backward, grad), collect, None, peak_bytes)

    def expected(_: str | None) -> list[Tensor]:
        def part(x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            return torch_call(
                reference.pairwise_distance, (x.double(), y.double()), backward, grad.double()
            )()

        out, *grads = part(x[:64], y, grad[:64])
        if not backward:
            return [out]
        return [out, grads[0], part(x, y[:8], grad[:, :8])[2]]

    differences = 4 * queries * rows * features
    sqeuclidean = pytorch.sqeuclidean_bmm
    variants = [
        *ours(build, collect, device),
        torch_variant("eager GEMM", "eager", sqeuclidean, torch_call),
        Variant("JAX jit einsum", "jax", lambda: in_jax.distance(x, y, grad, backward), jax_collect),
        torch_variant("compiled GEMM", "compiled", sqeuclidean, compiled_call),
        torch_variant("eager torch.cdist", "eager", pytorch.sqeuclidean_cdist, torch_call),
        torch_variant(
            "eager broadcasting",
            "eager",
            pytorch.sqeuclidean_broadcasting,
            torch_call,
            differences * (4.5 if backward else 2),
        ),
        Variant(
            "pytorch-metric-learning",
            "library",
            lambda: torch_call(libraries.pml_sqeuclidean(), (x, y), backward, grad),
            collect,
        ),
    ]
    ends = (queries + rows) * features
    flops = (2 * queries * rows * features + 2 * ends) * (3 if backward else 1)
    traffic = 4 * (ends + queries * rows) * (2 if backward else 1)
    name = f"pairwise_distance {queries} x {rows} x {features}, {direction(backward)}"
    return Case(name, variants, flops, traffic, functools.cache(expected), targets)


def cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """From small to large; on a GPU the large ones first, which show the kernels and not the launches."""
    small, large = (BEST_OF_ALL,), (FLOOR,)
    one = (TORCH_EAGER, dataclasses.replace(BEST_OF_ALL, ratio=2))
    split = Target(2, ("eager", "jax", "compiled"), "the best split by hand")
    gemm = Target(1, ("compiled", "eager"), "the compiled GEMM")
    huge = (1000, 1000, 512) if quick else (10_000, 1000, 512)
    # Name, what builds it, its size, targets.
    kinds: list[tuple[str, Callable[..., Case], Sequence[object], Sequence[Target]]] = []

    def add(name: str, build: Callable[..., Case], size: Size, targets: Sequence[Target]) -> None:
        size = dataclasses.replace(size, tasks=min(size.tasks, 16)) if quick else size
        kinds.append((name.format(size), build, (size,), targets))

    add("prototypical_loss {}", prototypical_case, Size(1, 5, 1, 64), one)
    add("prototypical_loss {}", prototypical_case, Size(64, 5, 1, 64), small)
    add("prototypical_loss {}", prototypical_case, Size(1024, 5, 1, 64), small)
    add("prototypical_loss {}", prototypical_case, Size(1024, 20, 1, 64), small)
    add("prototypical_loss {}", prototypical_case, Size(64, 20, 5, 512), large)
    add("prototypical_loss {}", prototypical_case, Size(1024, 5, 1, 512), large)
    add("prototypical_loss {}", prototypical_case, LARGEST, large)
    add("matching_loss {}", matching_case, Size(1024, 20, 1, 64), small)
    add(f"relation head {{}} H={HIDDEN}", relation_case, Size(64, 20, 5, 512), (split,))
    add(f"relation head {{}} H={HIDDEN}", relation_case, Size(64, 20, 1, 64), (split,))
    kinds.append((f"pairwise_distance {huge[0]} x {huge[1]} x {huge[2]}", distance_case, huge, (gemm,)))

    if device.type == "cuda":
        kinds.reverse()
    for name, build, size, targets in {name: (name, *rest) for name, *rest in kinds}.values():
        for backward in (False, True):
            # 0.8 GiB of embeddings: on the CPU the backward would hold as much again for every variant.
            if not (backward and size == (LARGEST,) and device.type == "cpu"):
                full = f"{name}, {direction(backward)}"
                yield full, functools.partial(build, *size, device, backward, targets)
