"""The second door (doors.py) of the learned optimizers: a vmapped dimension becomes more tensors.

A `_Derivative` knows tensors only, so here the op's lists are spelled out, as grads0, ..., params0, ...,
losses (where there are any), state, weights0, .... Each vmapped example has its own tensors in the lists, and
its own blocks of state. Losses and weights of each example's own, or their gradients, are beyond the kernels:
the reference takes these.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast._dispatch import doors
from metafast._dispatch.doors import Chain, Dims, Folding, Op, Results
from metafast.reference import learned_optimizer as reference
from metafast.reference.inner_loop import float32_under_autocast

_OPTIONS = ("head", "preprocess", "p", "scale", "unrolled")


@dataclass(frozen=True, eq=False)
class UnrollChain(Chain):
    """The unroll of lists of so many tensors, and its derivative."""

    lists: tuple[int, int, int, int] = (0, 0, 0, 0)  # grads, params, losses, weights

    @staticmethod
    def spell(
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        losses: Tensor | None,
        state: Tensor,
        weights: Sequence[Tensor],
    ) -> list[Tensor]:
        """The op's tensors one by one."""
        return [*grads, *params, *([] if losses is None else [losses]), state, *weights]

    def pack(self, args: Sequence[Any]) -> list[Any]:
        """The op's arguments, with its lists."""
        grads, params, losses, weights = self.lists
        state = grads + params + losses
        end = state + 1 + weights
        return [
            list(args[:grads]),
            list(args[grads : grads + params]),
            args[grads + params] if losses else None,
            args[state],
            list(args[state + 1 : end]),
            *args[end:],
        ]

    @staticmethod
    def split(results: Results) -> tuple[list[Tensor], Tensor]:
        """What the op returns."""
        *out, state = results
        return out, state

    def run(self, order: int, wanted: Sequence[str], args: Sequence[Any]) -> Results:
        op = getattr(doors.ops, self.ops[order].name).default
        if order == 0:
            out, state = op(*self.pack(args))
            return *out, state
        *out, state = args[: self.results]
        groups = ("grads", "params", "losses", "state", "weights")
        flags = [any(name.startswith(group) for name in wanted) for group in groups]
        return tuple(op(out, state, *self.pack(args[self.results :]), flags))

    def fold(
        self, order: int, wanted: Sequence[str], size: int, args: Sequence[Any], in_dims: Dims
    ) -> Folding | None:
        op = self.ops[order]
        dims = dict(zip(op.names, in_dims, strict=True))
        shared = {name for name in self.ops[0].inputs if name.startswith(("losses", "weights"))}
        if any(dims[name] is not None for name in shared) or not shared.isdisjoint(wanted):
            return None
        of_examples = [
            arg if dim is None or name in shared else arg.movedim(dim, 0)  # [V, ...]
            for name, arg, dim in zip(op.names, args, in_dims, strict=True)
        ]
        grads, params, losses, weights = self.lists
        chain = unroll_chain(size * grads, size * params, losses, weights)

        def each(begin: int, count: int) -> list[Tensor]:
            """Tensors [begin, begin + count) of one example after the other."""
            group = [
                of_examples[i].unbind() if in_dims[i] is not None else [of_examples[i]] * size
                for i in range(begin, begin + count)
            ]
            return [tensor for example in zip(*group, strict=True) for tensor in example]

        def blocks(i: int) -> Tensor:
            state = of_examples[i]
            state = state if in_dims[i] is not None else state.expand(size, *state.shape)
            return state.flatten(0, 1)

        results = [*each(0, grads), blocks(grads)] if order == 1 else []
        first = self.results if order == 1 else 0
        state = first + grads + params + losses
        folded = [
            *results,
            *each(first, grads),
            *each(first + grads, params),
            *of_examples[state - losses : state],
            blocks(state),
            *of_examples[state + 1 :],
        ]

        def split(found: Results) -> tuple[Results, Dims]:
            """The examples' tensors, stacked again. What was not wanted is of size 0, and one for all."""
            groups = [("grads", grads), ("params", params), ("losses", losses), ("state", 1)]
            if order == 0:
                groups = [("out", grads), ("state", 1)]
            tensors: list[Tensor] = []
            places: list[int | None] = []
            begin = 0
            for name, count in groups:
                packed = name == "state"
                given = found[begin : begin + (count if packed or name == "losses" else size * count)]
                begin += len(given)
                if order and not any(one.startswith(name) for one in wanted):
                    tensors += given[:count]
                    places += [None] * count
                    continue
                tensors += (
                    [given[0].unflatten(0, (size, -1))]
                    if packed
                    else [torch.stack(given[i::count]) for i in range(count)]
                )
                places += [0] * count
            rest = found[begin:]
            return (*tensors, *rest), (*places, *[None] * len(rest))

        return chain, folded, split


@functools.lru_cache(maxsize=64)
def unroll_chain(grads: int, params: int, losses: int, weights: int) -> UnrollChain:
    """lstm_unroll of lists of so many tensors, as a function of tensors: the results, then the new state."""
    tensors = (
        *(f"grads{i}" for i in range(grads)),
        *(f"params{i}" for i in range(params)),
        *(["losses"] if losses else []),
        "state",
        *(f"weights{i}" for i in range(weights)),
    )
    inputs = (*tensors, *_OPTIONS)
    outputs = (*(f"out{i}" for i in range(grads)), "new_state")

    def twin(*args: Any) -> Results:
        out, state = reference.unroll(*chain.pack(args))
        return *out, state

    chain = UnrollChain(
        ops=(
            Op("lstm_unroll", inputs, outputs),
            Op(
                "lstm_unroll_backward",
                (*(doors.gradient_name(output) for output in outputs), *inputs),
                tuple(f"grad_{name}" for name in tensors),
            ),
        ),
        reference=twin,
        event_dims={},
        wrap=float32_under_autocast,
        results=len(outputs),
        lists=(grads, params, losses, weights),
    )
    return chain
