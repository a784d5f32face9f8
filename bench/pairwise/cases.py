"""What stands beside what: all variants get the same embeddings and have to return the same loss, and with
"forward + backward" the same gradients of support, query and head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Comparison:
    """The variants of a loss of episodes: functions of the support, the queries and, of a relation, the head.

    `against` are the labels of the queries [..., Q], or the scores that they should have [..., Q, N].
    """

    episodes: Episodes
    against: Tensor
    backward: bool
    head: Sequence[Tensor] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.episodes.support, self.episodes.query, *self.head

    def metafast(self, loss: Callable[..., Tensor]) -> list[Variant]:
        def build() -> Callable[[], object]:
            return torch_call(loss, self.tensors, self.backward)

        return ours(build, self.episodes.collect, self.against.device)

    def eager(
        self, name: str, loss: Callable[..., Tensor], peak_bytes: float = 0, kind: str = "eager"
    ) -> Variant:
        call = compiled_call if kind == "compiled" else torch_call
        return Variant(
            name,
            kind,
            lambda: call(loss, self.tensors, self.backward),
            self.episodes.collect,
            peak_bytes=peak_bytes,
        )

    def compiled(self, name: str, loss: Callable[..., Tensor], peak_bytes: float = 0) -> Variant:
        return self.eager(name, loss, peak_bytes, "compiled")

    def jax(self, name: str, loss: Callable[..., object], **constants: object) -> Variant:
        def build() -> Callable[[], object]:
            return in_jax.jitted(self.against.device, loss, self.tensors, self.backward, **constants)

        return Variant(name, "jax", build, lambda result: self.episodes.collect(to_torch(result)))

    def library(
        self,
        name: str,
        make: Callable[[], tuple[Callable[..., Tensor], Sequence[Tensor]]],
        metric: str | None = None,
        collect: Callable[[list[Tensor]], list[Tensor]] = lambda results: results,
    ) -> Variant:
        """`make` gives a loss of one episode (support, support labels, query, `against`), and its head."""

        def build() -> Callable[[], object]:
            loss, head = make()
            return libraries.episode_loop(loss, self.episodes, self.against, head, self.backward)

        of_loop = libraries.loop_collect(self.episodes)
        return Variant(name, "library", build, lambda results: collect(of_loop(results)), metric)

    def case(
        self,
        name: str,
        variants: Sequence[Variant],
        flops: float,
        targets: Sequence[Target],
        loss_sum: Callable[[str | None], Callable[..., Tensor]],
        tolerance: float = 1e-4,
    ) -> Case:
        """`loss_sum(metric)` is the reference's, summed over the queries: see `Episodes.expected`."""
        e, backward = self.episodes, self.backward

        @functools.cache
        def expected(metric: str | None) -> list[Tensor]:
            return e.expected(loss_sum(metric), self.against, self.head, backward)

        full = f"{name}, {direction(backward)}"
        return Case(full, variants, flops, e.size.traffic(backward), expected, targets, tolerance)


def prototypical_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    c = Comparison(e, e.query_labels, backward)

    def loss(support: Tensor, query: Tensor) -> Tensor:
        return metafast.prototypical_loss(support, e.support_labels, query, e.query_labels, size.way)

    def by(logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda support, query: pytorch.prototypical_loss(
            logits, support, query, e.query_labels, size.way
        )

    def easyfsl() -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        return libraries.easyfsl_prototypical_loss(), ()

    def pml() -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        distance = libraries.pml_sqeuclidean()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(-distance(query, pytorch.class_means(support, size.way)), labels)

        return loss, ()

    def loss_sum(metric: str | None) -> Callable[..., Tensor]:
        options = {"metric": metric or "sqeuclidean", "reduction": "sum"}
        return lambda s, s_labels, q, q_labels: reference.prototypical_loss(
            s, s_labels, q, q_labels, size.way, **options
        )

    held = 4 * size.pairs * size.features * (4.5 if backward else 2)  # bytes of so many [T, Q, N, D]
    variants = [
        *c.metafast(loss),
        c.eager("eager bmm without |q|^2", by(pytorch.logits_bmm_without_query_norm)),
        c.jax("JAX jit einsum", in_jax.prototypical_loss, labels=e.query_labels, way=size.way),
        c.compiled("compiled bmm", by(pytorch.logits_bmm_without_query_norm)),
        c.eager("eager bmm", by(pytorch.logits_bmm)),
        c.eager("eager torch.cdist", by(pytorch.logits_cdist)),
        c.eager("eager broadcasting", by(pytorch.logits_broadcasting), held),
        c.compiled("compiled broadcasting", by(pytorch.logits_broadcasting)),
        c.library("easyfsl, euclidean", easyfsl, "euclidean"),
        c.library("pytorch-metric-learning", pml),
    ]
    flops = size.prototypical_flops(backward)
    return c.case(f"prototypical_loss {size}", variants, flops, targets, loss_sum)


def matching_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    c = Comparison(e, e.query_labels, backward)

    def loss(support: Tensor, query: Tensor) -> Tensor:
        return metafast.matching_loss(support, e.support_labels, query, e.query_labels, size.way)

    def by(cosine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda support, query: pytorch.matching_loss(cosine, support, query, e.query_labels, size.way)

    def easyfsl() -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        raise Skip("its MatchingNetworks always runs LSTM encoders: another computation")

    def pml() -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        cosine = libraries.pml_cosine()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return pytorch.matching_loss(cosine, support, query, labels, size.way)

        return loss, ()

    def loss_sum(_: str | None) -> Callable[..., Tensor]:
        return lambda s, s_labels, q, q_labels: reference.matching_loss(
            s, s_labels, q, q_labels, size.way, reduction="sum"
        )

    held = 5 * 4 * size.tasks * size.queries * size.support * size.features  # bytes of five [T, Q, S, D]
    variants = [
        *c.metafast(loss),
        c.eager("eager bmm", by(pytorch.cosine_bmm)),
        c.jax("JAX jit einsum", in_jax.matching_loss, labels=e.query_labels, way=size.way),
        c.compiled("compiled bmm", by(pytorch.cosine_bmm)),
        c.eager("eager F.cosine_similarity", by(pytorch.cosine_broadcasting), held),
        c.library("easyfsl", easyfsl),
        c.library("pytorch-metric-learning", pml),
    ]
    return c.case(f"matching_loss {size}", variants, size.matching_flops(backward), targets, loss_sum)


def relation_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    c = Comparison(e, e.targets, backward, e.head())

    def loss(support: Tensor, query: Tensor, *head: Tensor) -> Tensor:
        rows = metafast.prototypes(support, e.support_labels, size.way)
        return F.mse_loss(metafast.relation_scores(query, rows, *head), e.targets)

    def by(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: pytorch.relation_loss(scores, *tensors, targets=e.targets, way=size.way)

    def easyfsl_collect(results: list[Tensor]) -> list[Tensor]:
        if backward:
            results[3] = results[3].roll(size.features, 1)  # back to [query; prototype]
        return results

    def loss_sum(_: str | None) -> Callable[..., Tensor]:
        def loss(support: Tensor, labels: Tensor, query: Tensor, target: Tensor, *head: Tensor) -> Tensor:
            rows = reference.prototypes(support, labels, size.way)
            return (reference.relation_scores(query, rows, *head) - target).square().sum()

        return loss

    hidden = 6 * 4 * size.pairs * HIDDEN  # bytes of six [T, Q, N, H]
    pairs = 3 * 8 * size.pairs * size.features  # bytes of three [T, Q, N, 2 D]
    concatenated = by(pytorch.relation_scores_concatenated)
    variants = [
        *c.metafast(loss),
        c.eager("eager split", by(pytorch.relation_scores_split), hidden),
        c.jax("JAX jit split", in_jax.relation_loss, targets=e.targets, way=size.way),
        c.compiled("compiled split", by(pytorch.relation_scores_split), hidden),
        c.eager("eager concatenation", concatenated, pairs + hidden, kind="library"),
        c.library(
            "easyfsl (concatenates)",
            lambda: libraries.easyfsl_relation_loss(c.head),
            collect=easyfsl_collect,
        ),
    ]
    name = f"relation head {size} H={HIDDEN}"
    # Among millions of relus some argument is almost 0, and W q + W p falls on its other side than W [q; p].
    tolerance = 1e-3
    return c.case(name, variants, size.relation_flops(backward), targets, loss_sum, tolerance)


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
