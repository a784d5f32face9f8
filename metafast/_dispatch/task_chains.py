"""The second door (doors.py) of the inner loop ops: a vmapped dimension becomes more tasks.

Their tensors have one task dimension T, and lists of parameters and learning rates. A `_Derivative` knows
tensors only, so here the lists are spelled out, as params0, params1, ..., lr0, ...; a vmapped dimension is
folded into T. Parameters that the tasks share stay shared if the vmapped dimension shares them too; where
each of its examples has its own, or its own gradient, each task gets a copy. Learning rates and step weights
of each example's own, or their gradients, are beyond the kernels: the reference takes these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metafast._dispatch import doors
from metafast._dispatch.doors import Chain, Dims, Folding, Op, Results
from metafast.reference import inner_loop as reference

_OPTIONS = ("loss", "steps", "activation", "momentum", "first_order")


@dataclass(frozen=True, eq=False)
class _TaskChain(Chain):
    """An inner loop op and its derivative. Arguments come in the order of the op's schema."""

    params: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # [T, ...]
    rates: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # other tensors that have a gradient, or None
    task_weights: tuple[str, ...] = ()  # of these, what is [T, ...]; the others are the same for all tasks
    gives_list: bool = False
    fixed: tuple[Any, ...] = ()  # the op's last arguments, which are no arguments here

    def pack(self, args: Sequence[Any]) -> list[Any]:
        """The op's arguments, with its lists."""
        data = len(self.params)
        rates = data + len(self.data)
        others = rates + len(self.rates)
        return [list(args[:data]), *args[data:rates], list(args[rates:others]), *args[others:]]

    def run(self, order: int, wanted: Sequence[str], args: Sequence[Any]) -> Results:
        op = getattr(doors.ops, self.ops[order].name).default
        if order == 0:
            result = op(*self.pack(args), *self.fixed)
            return tuple(result) if self.gives_list else (result,)
        grads, args = args[: self.results], args[self.results :]
        groups = (self.params, self.rates, *((name,) for name in (*self.data, *self.weights)))
        flags = [not set(group).isdisjoint(wanted) for group in groups]
        result = op(list(grads) if self.gives_list else grads[0], *self.pack(args), *self.fixed, flags)
        of_inputs = result if self.gives_list else result[1]  # maml_loss_backward gives the loss, too
        found = dict(zip((name for group in groups for name in group), of_inputs, strict=True))
        return tuple(found[name.removeprefix("grad_")] for name in self.ops[1].outputs)

    def fold(
        self, order: int, wanted: Sequence[str], size: int, args: Sequence[Any], in_dims: Dims
    ) -> Folding | None:
        op = self.ops[order]
        values, dims = (dict(zip(op.names, given, strict=True)) for given in (args, in_dims))
        outputs = [name.removeprefix("grad_") for name in op.outputs]
        per_task = {
            *self.data,
            *self.task_weights,
            *(set(op.names) - set(self.ops[0].names)),
            *(outputs if order == 0 else ()),
        }

        def own(name: str) -> bool:
            """Has each of the vmapped examples its own, or its own gradient?"""
            return dims[name] is not None or name in wanted

        def shared(name: str) -> bool:
            """Is it a parameter that the tasks of one example share?"""
            if name not in self.params:
                return False
            return values[name].dim() - (dims[name] is not None) == 2 - self.params.index(name) % 2

        if any(own(name) for name in self.ops[0].names if name not in self.params and name not in per_task):
            return None
        copies = any(map(own, self.params))
        tasks = self._tasks(values[self.data[0]], dims[self.data[0]])

        def join(name: str) -> Any:
            value, dim = values[name], dims[name]
            if name not in per_task and not (name in self.params and (copies or not shared(name))):
                return value
            if value is None:
                return None
            value = value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)
            if shared(name):
                value = value.unsqueeze(1).expand(size, tasks, *value.shape[1:])
            return value.flatten(0, 1)

        def split(results: Results) -> tuple[Results, Dims]:
            found, places = [], []
            for name, result in zip(outputs, results, strict=True):
                folded = order == 0 or name in wanted  # else it is of size 0
                result = result.unflatten(0, (size, tasks)) if folded else result
                found.append(result.sum(1) if folded and shared(name) else result)
                places.append(0 if folded else None)
            return tuple(found), tuple(places)

        return self, [join(name) for name in op.names], split

    @staticmethod
    def _tasks(data: Tensor, dim: int | None) -> int:
        return data.shape[0] if dim is None else data.movedim(dim, 0).shape[1]


def _chain(
    name: str,
    twin: Callable[..., Any],
    *,
    params: int,
    rates: int,
    data: tuple[str, ...],
    weights: tuple[str, ...],
    task_weights: tuple[str, ...],
    labels: bool,
    outputs: tuple[str, ...],
    gives_list: bool,
    fixed: tuple[Any, ...],
) -> _TaskChain:
    param_names, rate_names = (
        tuple(f"{kind}{i}" for i in range(count)) for kind, count in (("params", params), ("lr", rates))
    )
    inputs = (*param_names, *data, *rate_names, *weights, *_OPTIONS)
    of_data = (x for x in data if not (labels and x.endswith("y")))
    differentiable = (*param_names, *rate_names, *of_data, *weights)

    def reference_of(*args: Any) -> Any:
        result = twin(*chain.pack(args))
        return tuple(result) if gives_list else result

    chain = _TaskChain(
        ops=(
            Op(name, inputs, outputs),
            Op(
                f"{name}_backward",
                (*(doors.gradient_name(output) for output in outputs), *inputs),
                tuple(f"grad_{x}" for x in differentiable),
            ),
        ),
        reference=reference_of,
        event_dims={},
        wrap=reference.float32_under_autocast,
        results=len(outputs),
        params=param_names,
        data=data,
        rates=rate_names,
        weights=weights,
        task_weights=task_weights,
        gives_list=gives_list,
        fixed=fixed,
    )
    return chain


def _options(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_OPTIONS, values, strict=True))


def _rate(lr: list[Tensor]) -> Tensor | list[Tensor]:
    return lr[0] if len(lr) == 1 else lr


@functools.lru_cache(maxsize=64)
def inner_sgd_chain(params: int, rates: int, labels: bool) -> Chain:
    """inner_sgd of so many parameters and rates, as a function of tensors: the adapted parameters."""

    def twin(
        params: list[Tensor],
        x: Tensor,
        y: Tensor,
        lr: list[Tensor],
        example_weights: Tensor | None,
        *options: Any,
    ) -> list[Tensor]:
        return reference.inner_sgd(
            params, x, y, lr=_rate(lr), example_weights=example_weights, **_options(options)
        )

    return _chain(
        "inner_sgd",
        twin,
        params=params,
        rates=rates,
        data=("x", "y"),
        weights=("example_weights",),
        task_weights=("example_weights",),
        labels=labels,
        outputs=tuple(f"adapted{i}" for i in range(params)),
        gives_list=True,
        fixed=(),
    )


@functools.lru_cache(maxsize=64)
def maml_loss_chain(params: int, rates: int, labels: bool) -> Chain:
    """maml_loss of so many parameters and rates, as a function of tensors: the loss of each task."""

    def twin(
        params: list[Tensor],
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        lr: list[Tensor],
        step_weights: Tensor | None,
        support_weights: Tensor | None,
        query_weights: Tensor | None,
        *options: Any,
    ) -> Tensor:
        return reference.maml_loss(
            params,
            support_x,
            support_y,
            query_x,
            query_y,
            lr=_rate(lr),
            step_weights=step_weights,
            support_weights=support_weights,
            query_weights=query_weights,
            reduction="none",
            **_options(options),
        )

    return _chain(
        "maml_loss",
        twin,
        params=params,
        rates=rates,
        data=("support_x", "support_y", "query_x", "query_y"),
        weights=("step_weights", "support_weights", "query_weights"),
        task_weights=("support_weights", "query_weights"),
        labels=labels,
        outputs=("out",),
        gives_list=False,
        fixed=(False,),  # no mean: the tasks of each vmapped example have one of their own
    )
