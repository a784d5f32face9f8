"""`adapt` by the path that it chooses and by the other general one, beside what people write today.

On a GPU the cases of five_shot.py come first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import metafast
from bench.common.cases import Case, Target, Variant
from bench.common.in_jax import to_torch
from bench.networks import five_shot
from bench.networks.peers import by_hand, in_jax, libraries, pytorch
from bench.networks.workloads import NETWORKS, Network, Problem, ours

BEST = ("eager", "transforms", "library"), "the best of loop, torch.func and the libraries"
COMPILED, COMPILING_S = "Conv4-64, T=4, K=1", 200  # the one case with torch.compile, which takes minutes
NOT_SLOWER = (Target(1 / 1.1, *BEST),)
FUSED = Target(2, *BEST), Target(5, ("transforms",), "torch.func"), Target(1.5)


def cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    if device.type == "cuda":
        yield from five_shot.cases(device, quick)
    sizes = [(4, 1)] if quick else [(4, 1), (4, 5), (16, 1), (16, 5), (32, 1), (1, 1)]
    for tasks, steps in sizes:
        networks = NETWORKS[:2] if tasks == 16 else NETWORKS  # the fused ones
        for network in NETWORKS[1:3] if quick else networks:
            name = f"{network.name}, T={tasks}, K={steps}"
            yield name, functools.partial(case, network, tasks, steps, device)


def case(network: Network, tasks: int, steps: int, device: torch.device) -> Case:
    problem = Problem(network, tasks, steps, device)

    def expected(_: str | None) -> Sequence[Tensor]:
        return [result.detach() for result in pytorch.loop(problem.in_float64())()]

    def variant(
        name: str, kind: str, of: Callable[[Problem], Callable[[], object]], build_s: float = 0
    ) -> Variant:
        collect = to_torch if kind == "jax" else list
        return Variant(name, kind, lambda: of(problem), collect, build_s=build_s)

    compiled = functools.partial(pytorch.transforms, compiled=True)
    path = metafast.explain(problem.module, problem.data[0]).path
    return Case(
        problem.name,
        [
            variant(f"metafast (path {path})", "metafast", lambda p: ours(p, None)),
            *(
                variant(f'metafast, path="{other}"', f"metafast, {other}", lambda p, o=other: ours(p, o))
                for other in ("torch.func", "loop")
                if other != path
            ),
            variant("plain loop", "eager", pytorch.loop),
            variant("torch.func", "transforms", pytorch.transforms),
            *(
                [
                    variant("unfold and bmm", "by hand", by_hand.unfold),
                    variant("JAX jit(grad(vmap))", "jax", in_jax.vmap),
                ]
                if problem.is_conv4
                else []
            ),
            variant("learn2learn", "library", libraries.learn2learn),
            variant("higher", "library", libraries.higher),
            variant("TorchOpt", "library", libraries.torchopt),
            *(
                [variant("torch.func, compiled", "compiled", compiled, COMPILING_S)]
                if problem.name == COMPILED
                else []
            ),
        ],
        flops=problem.flops(pytorch.loop(problem)),
        traffic=0.0,
        expected=expected,
        targets=FUSED if path == "fused" else NOT_SLOWER,
        tolerance=1e-3,  # of a gradient through batch norm of five examples
    )
