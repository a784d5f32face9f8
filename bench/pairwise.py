"""The pairwise family against what people use today: prototypical, matching and relation losses, distances.

All variants get the same embeddings and have to return the same loss, and with "forward + backward" the same
gradients of support, query and head. 15 queries per class. The libraries work on one episode at a time, as
their users call them, and loop over the tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import metafast
from bench import _peers as peers
from bench._harness import (
    Case,
    Clock,
    Plan,
    Report,
    Target,
    Variant,
    judge,
    measure_peak,
    parse,
    print_case,
    run_case,
)
from metafast import reference

QUERIES_PER_CLASS = 15
HIDDEN = 64  # of the relation head
CHECKED_TASKS = 16  # the gradients of so many tasks are compared with the reference; the loss is that of all

ALL = ("eager", "compiled", "jax", "library")
TORCH_EAGER = Target(4, ("eager",), "the best eager PyTorch")
BEST_OF_ALL = Target(3, ALL)
FLOOR = Target(2)


@dataclass(frozen=True)
class Size:
    tasks: int
    way: int
    shot: int
    features: int

    def __str__(self) -> str:
        return f"{self.tasks} x {self.way}-way {self.shot}-shot D={self.features}"

    @property
    def support(self) -> int:
        return self.way * self.shot

    @property
    def queries(self) -> int:
        return self.way * QUERIES_PER_CLASS

    @property
    def embeddings(self) -> int:
        return self.tasks * (self.support + self.queries) * self.features

    @property
    def pairs(self) -> int:
        return self.tasks * self.queries * self.way

    def traffic(self, backward: bool) -> float:
        """Embeddings are read, and their gradients written, once."""
        return 4 * self.embeddings * (2 if backward else 1) + 8 * self.embeddings / self.features

    def prototypical_flops(self, backward: bool) -> float:
        """Means, class norms, and one matrix product forward, two backward."""
        means_and_norms = self.tasks * self.features * (self.support + 2 * self.way)
        return (means_and_norms + 2 * self.pairs * self.features) * (1 if not backward else 3)

    def matching_flops(self, backward: bool) -> float:
        products = self.tasks * self.queries * self.support * self.features
        return (2 * products + 2 * self.embeddings) * (1 if not backward else 3)

    def relation_flops(self, backward: bool) -> float:
        """The split first layer, then per pair and hidden unit: add, relu, multiply, add; backward again the
        first two, multiply and add for the weight, one addition for the query and one for the class."""
        layer = 2 * self.tasks * (self.queries + self.way) * self.features * HIDDEN
        hidden = self.pairs * HIDDEN
        return 3 * layer + 10 * hidden if backward else layer + 4 * hidden


class Episodes:
    """Random embeddings of `size`. A single task has no task dimension, as people write it."""

    def __init__(self, size: Size, device: torch.device) -> None:
        lead = (size.tasks,) if size.tasks > 1 else ()
        scale = size.features**-0.5  # distances of about 2: no saturated softmax, all gradients count
        self.size = size
        self.support = torch.randn(*lead, size.support, size.features, device=device) * scale
        self.query = torch.randn(*lead, size.queries, size.features, device=device) * scale
        classes = torch.arange(size.way, device=device)
        self.support_labels = classes.repeat_interleave(size.shot).expand(*lead, -1).contiguous()
        self.query_labels = classes.repeat(QUERIES_PER_CLASS).expand(*lead, -1).contiguous()
        self.targets = F.one_hot(self.query_labels, size.way).float()

    def head(self) -> tuple[Tensor, ...]:
        """weight [H, 2 D], bias [H], out_weight [1, H], out_bias [1]"""
        first, last = torch.nn.Linear(2 * self.size.features, HIDDEN), torch.nn.Linear(HIDDEN, 1)
        parameters = (first.weight, first.bias, last.weight, last.bias)
        return tuple(p.detach().to(self.support.device) for p in parameters)

    def per_task(self, tensor: Tensor) -> Tensor:
        return tensor if self.size.tasks > 1 else tensor.unsqueeze(0)

    def collect(self, result: Sequence[Tensor]) -> list[Tensor]:
        """(loss, grad_support, grad_query, grads of the head ...) -> the same, as far as it is checked."""
        loss, *grads = (torch.as_tensor(r) for r in result)
        return [loss, *(self.per_task(g)[:CHECKED_TASKS] for g in grads[:2]), *grads[2:]]

    def expected(
        self, loss_of: Callable[..., Tensor], targets: Tensor, shared: Sequence[Tensor], backward: bool
    ) -> list[Tensor]:
        """What `collect` returns, of the float64 reference; `loss_of` has to be a sum over queries."""
        tasks = self.size.tasks
        support, query, labels, target = map(
            self.per_task, (self.support, self.query, self.support_labels, targets)
        )
        chunk = max(1, min(CHECKED_TASKS, tasks * 2**22 // (self.size.pairs * self.size.features)))
        loss, grads, shared_grads = 0.0, [], [torch.zeros_like(p, dtype=torch.float64) for p in shared]
        for begin in range(0, tasks, chunk):
            part = slice(begin, begin + chunk)
            needs_grad = backward and (bool(shared) or begin < CHECKED_TASKS)
            leaves = [t.double().requires_grad_(needs_grad) for t in (support[part], query[part], *shared)]
            part_loss = loss_of(leaves[0], labels[part], leaves[1], target[part], *leaves[2:])
            loss += part_loss.detach()
            if needs_grad:
                task_grads = torch.autograd.grad(part_loss, leaves)
                grads.append(task_grads[:2])
                shared_grads = [total + g for total, g in zip(shared_grads, task_grads[2:], strict=True)]
        collected = [torch.cat(g)[:CHECKED_TASKS] for g in zip(*grads, strict=True)]
        return [t / target.numel() for t in (loss, *collected, *(shared_grads if backward else ()))]


# --- how each kind of variant is called -------------------------------------------------------------------


def torch_call(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool, grad: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    if not backward:
        return lambda: (function(*tensors),)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, grad))

    return call


def compiled_call(function: Callable[..., Tensor], *args, **kwargs) -> Callable[[], tuple[Tensor, ...]]:
    return torch_call(torch.compile(function, dynamic=False), *args, **kwargs)


def jax_call(
    device: torch.device, function: Callable, tensors: Sequence[Tensor], backward: bool, **constants
) -> Callable[[], object]:
    jax = peers.import_jax(device)
    constants = {name: peers.jax_array(c) if isinstance(c, Tensor) else c for name, c in constants.items()}
    function = functools.partial(function, **constants)
    if backward:
        function = jax.value_and_grad(function, tuple(range(len(tensors))))
    compiled, arrays = jax.jit(function), [peers.jax_array(t) for t in tensors]
    return lambda: jax.block_until_ready(compiled(*arrays))


def from_jax(result: object) -> list[Tensor]:
    import numpy as np

    loss, *grads = result if isinstance(result, tuple) else (result,)
    return [torch.from_numpy(np.array(r)) for r in (loss, *(grads[0] if grads else ()))]


def episode_loop(
    loss_of: Callable[..., Tensor],
    episodes: Episodes,
    targets: Tensor,
    shared: Sequence[Tensor],
    backward: bool,
) -> Callable[[], list[tuple[Tensor, ...]]]:
    """One step per episode, as the libraries' users train."""
    parts = [
        (s.clone().requires_grad_(backward), labels, q.clone().requires_grad_(backward), t)
        for s, labels, q, t in zip(
            *map(episodes.per_task, (episodes.support, episodes.support_labels, episodes.query, targets)),
            strict=True,
        )
    ]

    def call() -> list[tuple[Tensor, ...]]:
        results = []
        for s, labels, q, t in parts:
            with torch.set_grad_enabled(backward):
                loss = loss_of(s, labels, q, t)
            results.append((loss, *torch.autograd.grad(loss, (s, q, *shared))) if backward else (loss,))
        return results

    return call


def from_loop(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Per episode -> of the mean loss of all episodes."""
    loss, *grads = zip(*results, strict=True)
    of_tasks = [torch.stack(g) / len(results) for g in grads[:2]]
    return [torch.stack(loss).mean(), *of_tasks, *(torch.stack(g).mean(0) for g in grads[2:])]


# --- the cases --------------------------------------------------------------------------------------------


def direction(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def loop_collect(episodes: Episodes) -> Callable[[object], list[Tensor]]:
    def collect(results: object) -> list[Tensor]:
        loss, *grads = from_loop(results)
        return [loss, *(g[:CHECKED_TASKS] for g in grads[:2]), *grads[2:]]

    return collect


def prototypical_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)
    differences = 4 * size.pairs * size.features  # bytes of [T, Q, N, D]

    def ours() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return metafast.prototypical_loss(support, e.support_labels, query, e.query_labels, size.way)

        return torch_call(loss, (e.support, e.query), backward)

    def torch_variant(
        name: str, kind: str, logits: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return peers.prototypical_loss(logits, support, query, e.query_labels, size.way)

        return Variant(
            name, kind, lambda: call(loss, (e.support, e.query), backward), e.collect, None, peak_bytes
        )

    def jax() -> Callable[[], object]:
        tensors = (e.support, e.query)
        return jax_call(
            device, peers.jax_prototypical_loss, tensors, backward, labels=e.query_labels.int(), way=size.way
        )

    def easyfsl() -> Callable[[], object]:
        return episode_loop(peers.easyfsl_prototypical_loss(), e, e.query_labels, (), backward)

    def pml() -> Callable[[], object]:
        distance = peers.pml_sqeuclidean()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(-distance(query, peers.class_means(support, size.way)), labels)

        return episode_loop(loss, e, e.query_labels, (), backward)

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
        Variant("metafast", "metafast", ours, e.collect),
        torch_variant("eager broadcasting", "eager", peers.logits_broadcasting, torch_call, held),
        torch_variant("eager torch.cdist", "eager", peers.logits_cdist, torch_call),
        torch_variant("eager bmm", "eager", peers.logits_bmm, torch_call),
        torch_variant("eager bmm without |q|^2", "eager", peers.logits_bmm_without_query_norm, torch_call),
        torch_variant("compiled bmm", "compiled", peers.logits_bmm_without_query_norm, compiled_call),
        torch_variant("compiled broadcasting", "compiled", peers.logits_broadcasting, compiled_call),
        Variant("JAX jit einsum", "jax", jax, lambda r: e.collect(from_jax(r))),
        Variant("easyfsl, euclidean", "library", easyfsl, loop_collect(e), "euclidean"),
        Variant("pytorch-metric-learning", "library", pml, loop_collect(e)),
    ]
    flops, traffic = size.prototypical_flops(backward), size.traffic(backward)
    name = f"prototypical_loss {size}, {direction(backward)}"
    return Case(name, variants, flops, traffic, functools.cache(expected), targets)


def matching_case(size: Size, device: torch.device, backward: bool, targets: Sequence[Target]) -> Case:
    e = Episodes(size, device)

    def ours() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return metafast.matching_loss(support, e.support_labels, query, e.query_labels, size.way)

        return torch_call(loss, (e.support, e.query), backward)

    def torch_variant(
        name: str, kind: str, cosine: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(support: Tensor, query: Tensor) -> Tensor:
            return peers.matching_loss(cosine, support, query, e.query_labels, size.way)

        return Variant(
            name, kind, lambda: call(loss, (e.support, e.query), backward), e.collect, None, peak_bytes
        )

    def jax() -> Callable[[], object]:
        tensors = (e.support, e.query)
        return jax_call(
            device, peers.jax_matching_loss, tensors, backward, labels=e.query_labels.int(), way=size.way
        )

    def easyfsl() -> Callable[[], object]:
        raise peers.Skip("its MatchingNetworks always runs LSTM encoders: another computation")

    def pml() -> Callable[[], object]:
        cosine = peers.pml_cosine()

        def loss(support: Tensor, _: Tensor, query: Tensor, labels: Tensor) -> Tensor:
            return peers.matching_loss(cosine, support, query, labels, size.way)

        return episode_loop(loss, e, e.query_labels, (), backward)

    def expected(_: str | None) -> list[Tensor]:
        def loss(support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
            return reference.matching_loss(support, labels, query, query_labels, size.way, reduction="sum")

        return e.expected(loss, e.query_labels, (), backward)

    products = 4 * size.tasks * size.queries * size.support * size.features  # bytes of [T, Q, S, D]
    variants = [
        Variant("metafast", "metafast", ours, e.collect),
        torch_variant("eager bmm", "eager", peers.cosine_bmm, torch_call),
        torch_variant(
            "eager F.cosine_similarity", "eager", peers.cosine_broadcasting, torch_call, 5 * products
        ),
        torch_variant("compiled bmm", "compiled", peers.cosine_bmm, compiled_call),
        Variant("JAX jit einsum", "jax", jax, lambda r: e.collect(from_jax(r))),
        Variant("easyfsl", "library", easyfsl, e.collect),
        Variant("pytorch-metric-learning", "library", pml, loop_collect(e)),
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

    def ours() -> Callable[[], tuple[Tensor, ...]]:
        def loss(support: Tensor, query: Tensor, *head: Tensor) -> Tensor:
            rows = metafast.prototypes(support, e.support_labels, size.way)
            return F.mse_loss(metafast.relation_scores(query, rows, *head), e.targets)

        return torch_call(loss, tensors, backward)

    def torch_variant(
        name: str, kind: str, scores: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        def loss(*tensors: Tensor) -> Tensor:
            return peers.relation_loss(scores, *tensors, targets=e.targets, way=size.way)

        return Variant(name, kind, lambda: call(loss, tensors, backward), e.collect, None, peak_bytes)

    def jax() -> Callable[[], object]:
        return jax_call(device, peers.jax_relation_loss, tensors, backward, targets=e.targets, way=size.way)

    def easyfsl() -> Callable[[], object]:
        loss, parameters = peers.easyfsl_relation_loss(head)
        return episode_loop(loss, e, e.targets, parameters, backward)

    def easyfsl_collect(results: object) -> list[Tensor]:
        collected = loop_collect(e)(results)
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
        Variant("metafast", "metafast", ours, e.collect),
        torch_variant("eager split", "eager", peers.relation_scores_split, torch_call, 6 * hidden),
        torch_variant(
            "eager concatenation",
            "library",
            peers.relation_scores_concatenated,
            torch_call,
            3 * concatenated + 6 * hidden,
        ),
        torch_variant("compiled split", "compiled", peers.relation_scores_split, compiled_call, 6 * hidden),
        Variant("JAX jit split", "jax", jax, lambda r: e.collect(from_jax(r))),
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

    def torch_variant(
        name: str, kind: str, function: Callable, call: Callable, peak_bytes: float = 0
    ) -> Variant:
        return Variant(name, kind, lambda: call(function, (x, y), backward, grad), collect, None, peak_bytes)

    def jax() -> Callable[[], object]:
        module = peers.import_jax(device)

        def forward_backward(x: object, y: object, grad: object) -> object:
            out, pullback = module.vjp(peers.jax_sqeuclidean, x, y)
            return (out, *pullback(grad))

        compiled = module.jit(
            forward_backward if backward else lambda x, y, _: (peers.jax_sqeuclidean(x, y),)
        )
        arrays = [peers.jax_array(t) for t in (x, y, grad)]
        return lambda: module.block_until_ready(compiled(*arrays))

    def jax_collect(result: Sequence[object]) -> list[Tensor]:
        return collect([from_jax(r)[0] for r in result])

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
    sqeuclidean = peers.sqeuclidean_bmm
    variants = [
        torch_variant("metafast", "metafast", metafast.pairwise_distance, torch_call),
        torch_variant(
            "eager broadcasting",
            "eager",
            peers.sqeuclidean_broadcasting,
            torch_call,
            differences * (4.5 if backward else 2),
        ),
        torch_variant("eager torch.cdist", "eager", peers.sqeuclidean_cdist, torch_call),
        torch_variant("eager GEMM", "eager", sqeuclidean, torch_call),
        torch_variant("compiled GEMM", "compiled", sqeuclidean, compiled_call),
        Variant("JAX jit einsum", "jax", jax, jax_collect),
        Variant(
            "pytorch-metric-learning",
            "library",
            lambda: torch_call(peers.pml_sqeuclidean(), (x, y), backward, grad),
            collect,
        ),
    ]
    ends = (queries + rows) * features
    flops = (2 * queries * rows * features + 2 * ends) * (3 if backward else 1)
    traffic = 4 * (ends + queries * rows) * (2 if backward else 1)
    name = f"pairwise_distance {queries} x {rows} x {features}, {direction(backward)}"
    return Case(name, variants, flops, traffic, functools.cache(expected), targets)


def cases(device: torch.device, quick: bool, only: str) -> Iterator[Callable[[], Case]]:
    """Built one after the other, so that one case's data is gone before the next one's comes."""

    def chosen(build: Callable[..., Case], name: str, *args) -> Iterator[Callable[[], Case]]:
        for backward in (False, True):
            if only in f"{name}, {direction(backward)}":
                yield functools.partial(build, *args[:-1], device, backward, args[-1])

    small, large = (BEST_OF_ALL,), (FLOOR,)
    one = (TORCH_EAGER, dataclasses.replace(BEST_OF_ALL, ratio=2))
    sizes = [
        (Size(1, 5, 1, 64), one),
        (Size(64, 5, 1, 64), small),
        (Size(1024, 5, 1, 64), small),
        (Size(1024, 20, 1, 64), small),
        (Size(64, 20, 5, 512), large),
        (Size(1024, 5, 1, 512), large),
        (Size(1024, 20, 5, 512), large),
    ]

    def reduced(size: Size) -> Size:
        return dataclasses.replace(size, tasks=min(size.tasks, 16)) if quick else size

    for size, targets in {reduced(size): targets for size, targets in sizes}.items():
        both = list(chosen(prototypical_case, f"prototypical_loss {size}", size, targets))
        # Forward only: beside 0.8 GiB of embeddings, backward would hold as much again for every variant.
        yield from both[:1] if size == Size(1024, 20, 5, 512) else both
    size = reduced(Size(1024, 20, 1, 64))
    yield from chosen(matching_case, f"matching_loss {size}", size, small)
    split = Target(2, ("eager", "jax", "compiled"), "the best split by hand")
    for size in map(reduced, (Size(64, 20, 5, 512), Size(64, 20, 1, 64))):
        yield from chosen(relation_case, f"relation head {size} H={HIDDEN}", size, (split,))
    huge = (1000, 1000, 512) if quick else (10_000, 1000, 512)
    gemm = Target(1, ("compiled", "eager"), "the compiled GEMM")
    yield from chosen(distance_case, f"pairwise_distance {huge[0]} x {huge[1]} x {huge[2]}", *huge, (gemm,))


def main(options: argparse.Namespace) -> None:
    clock = Clock(options.device)
    plan = Plan(variant_s=0.2, max_rounds=9) if options.quick else Plan()
    report = Report("pairwise", options)
    peak = measure_peak(clock, options.quick)
    print(f"sgemm peak {peak.flops / 1e9:.0f} GFLOP/s, bandwidth {peak.bandwidth / 1e9:.1f} GB/s")
    missed = []
    for build in cases(options.device, options.quick, options.only):
        case = build()
        torch._dynamo.reset()  # every case compiles for its own shapes
        rows = run_case(case, clock, plan, peak, options.memory * 2**30)
        verdicts = judge(case, rows)
        print_case(case, rows, verdicts, peak)
        missed += [f"{case.name}: {v['target']}: {v['reached']}" for v in verdicts if not v["met"]]
        report.results.append(
            {
                "case": case.name,
                "floor_ms": peak.floor(case) * 1e3,
                "flops": case.flops,
                "traffic_bytes": case.traffic,
                "variants": [dataclasses.asdict(row) for row in rows],
                "targets": verdicts,
            }
        )
    print("\nmissed targets:" if missed else "\nall targets met")
    for line in missed:
        print(f"  {line}")
    report.write(sgemm_flops=peak.flops, bandwidth_bytes=peak.bandwidth)


if __name__ == "__main__":
    main(parse("pairwise", __doc__))
