"""Which way a call takes to its kernel.

op         the registered op, differentiated in C++: an eager call outside function transforms, torch.compile.
function   C++ autograd functions raise under `torch.func`. A call inside `grad` (as many levels as the family
           has derivatives) and `vmap` goes through `_Derivative`, a Python `autograd.Function` over the same
           kernels.
reference  the rest (`jvp`, `hessian`, forward-mode AD, deeper nesting, `torch.func` inside torch.compile)
           runs the pure-PyTorch twin in `metafast.reference`: right, but slower.

A family describes its ops to the second door in `Chain`s; nothing here knows any op. An op that is made of
torch's own ops, or of ops that are differentiated as these are, composes with every transform as they do, and
goes through the first door everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from metafast import _C

ops: Any = torch.ops.metafast  # the namespace that ops are looked up in; the tests put another one here
typed: Any = _C  # the same ops with typed arguments, which an eager call reaches sooner

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Op:
    """The names of what a registered op takes and gives.

    A derivative's arguments are found by name: an input or output of the op it belongs to, `grad` for the
    gradient of `out`, `gg_x` for that of `grad_x`. It returns `grad_x`, the gradient of its input x.
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    carries: Sequence[str] = ()  # what its derivative needs and it does not

    @property
    def names(self) -> tuple[str, ...]:
        return *self.inputs, *self.carries


Results = tuple[Tensor, ...]
Dims = tuple[int | None, ...]
# The chain for the arguments with the vmapped dimension folded into another, these arguments, and how their
# results and its place come back.
Folding = tuple["Chain", list[Any], Callable[[Results], tuple[Results, Dims]]]


@dataclass(frozen=True, eq=False)
class Chain:
    """An op followed by its derivatives, first to last.

    Its tensors have any number of leading dimensions, which a vmapped dimension joins. A family whose ops
    do not overrides `run` and `fold`.
    """

    ops: tuple[Op, ...]
    reference: Callable[..., Any]  # the twin of ops[0]
    # How many of a tensor's dimensions belong to one task. A name that is absent is a tensor that all tasks
    # share.
    event_dims: Mapping[str, int]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    results: int = 1  # how many outputs of ops[0] a call returns; the others are for its derivatives

    def run(self, order: int, wanted: Sequence[str], args: Sequence[Any]) -> Results:
        """Op number `order`. Of gradients, those of the inputs in `wanted` count."""
        op = self.ops[order]
        result = getattr(ops, op.name).default(*args[: len(op.inputs)])
        return result if isinstance(result, tuple) else (result,)

    def fold(
        self, order: int, wanted: Sequence[str], size: int, args: Sequence[Any], in_dims: Dims
    ) -> Folding | None:
        """How op number `order` takes a vmapped dimension of this size; None if its kernel cannot."""
        op = self.ops[order]
        named = dict(zip(op.names, zip(args, in_dims, strict=True), strict=True))

        def per_example(name: str) -> bool:
            """Has each vmapped example its own of a tensor that all tasks share, or of its gradient?"""
            batched = named[name][1] is not None if name in named else _subject(name) in wanted
            return batched and _subject(name) not in self.event_dims

        if any(per_example(name) for name in (*op.names, *op.outputs)):
            return None

        def join(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor) or not self._has_leading(name, value):
                return value
            return value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)

        def split(results: Results) -> tuple[Results, Dims]:
            names = zip(op.outputs, results, strict=True)
            return results, tuple(0 if self._has_leading(*pair) else None for pair in names)

        return self, [join(name, *pair) for name, pair in named.items()], split

    def _has_leading(self, name: str, tensor: Tensor) -> bool:
        """May the tensor have leading dimensions? (One of too few dimensions stands for no tensor.)"""
        dims = self.event_dims.get(_subject(name))
        return dims is not None and tensor.dim() >= dims


def _subject(name: str) -> str:
    """What a gradient is the gradient of: gg_x -> x, grad_x -> x, grad -> out, grad_grad -> out."""
    subject = name.removeprefix("gg_").removeprefix("grad_")
    return "out" if subject == "grad" else subject


def gradient_name(output: str) -> str:
    """How an op's derivative calls the gradient of its output: out -> grad, grad_x -> gg_x, z -> grad_z."""
    if output == "out":
        return "grad"
    return output.replace("grad_", "gg_", 1) if output.startswith("grad_") else f"grad_{output}"


def call(chain: Chain, *args: Any) -> Tensor:
    """The first result of the chain's op, by the door that fits where the call is made."""
    if not _transforms_active():
        if torch.compiler.is_compiling():
            result = getattr(ops, chain.ops[0].name).default(*args)
            return result[0] if isinstance(result, tuple) else result
        if forward_ad._current_level < 0:
            return getattr(typed, chain.ops[0].name)(*args)
    if _kernels_compose(chain):
        _record(chain.ops[0].name, "function")
        return chain.wrap(lambda *tensors: _Derivative.apply(chain, 0, (), *tensors)[0])(*args)
    _record(chain.ops[0].name, "reference")
    return chain.reference(*args)


def call_listed(
    name: str,
    args: Sequence[Any],
    reference: Callable[[], Result],
    second: Callable[[], tuple[Chain, Callable[[Callable[..., Results]], Result]]] | None = None,
) -> Result:
    """The result of an op whose arguments hold lists of tensors, by the door that fits.

    `second` gives the chain that the second door takes, and what to do with its op as a function of tensors;
    None for an op without this door.
    """
    if not _transforms_active():
        compiling = torch.compiler.is_compiling()
        if compiling or forward_ad._current_level < 0:
            _record(name, "op")
            return getattr(ops, name).default(*args) if compiling else getattr(typed, name)(*args)
    if second is not None:
        chain, function = second()
        if _kernels_compose(chain):
            _record(name, "function")
            return function(chain.wrap(lambda *tensors: _Derivative.apply(chain, 0, (), *tensors)))
    _record(name, "reference")
    return reference()


def is_eager() -> bool:
    """Is the call outside function transforms, torch.compile and forward-mode AD?"""
    return takes_ops() and not torch.compiler.is_compiling()


def takes_ops() -> bool:
    """Is the call outside function transforms and forward-mode AD?"""
    return not _transforms_active() and forward_ad._current_level < 0


def call_eager(name: str, *args: Any) -> Tensor:
    """The result of an op where `is_eager`, through its typed entry point."""
    _record(name, "op")
    return getattr(typed, name)(*args)


def call_in_place(name: str, *args: Any) -> None:
    """An op that changes its arguments and has no derivative, so no other door."""
    if is_eager():
        getattr(typed, name)(*args)
    else:
        getattr(ops, name).default(*args)


def call_composed(name: str, *args: Any) -> Tensor:
    """The result of an op that composes with every transform."""
    _record(name, "op")
    return getattr(ops, name).default(*args)


def _kernels_compose(chain: Chain) -> bool:
    """Do the active transforms need no more than the chain's derivatives and a vmapped dimension?"""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    levels = [interpreter.key() for interpreter in get_interpreter_stack()]
    return all(level in (TransformType.Grad, TransformType.Vmap) for level in levels) and (
        levels.count(TransformType.Grad) < len(chain.ops)
    )


class _Derivative(torch.autograd.Function):
    """Op number `order` of a chain, differentiated by the next; a vmapped dimension is folded into others.

    `wanted` are the inputs whose gradients are asked for, where the op computes gradients.
    """

    @staticmethod
    def forward(chain: Chain, order: int, wanted: Sequence[str], *args: Any) -> Results:
        return chain.run(order, wanted, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.chain, ctx.order, _, *args = inputs
        op = ctx.chain.ops[ctx.order]
        values = {**dict(zip(op.names, args, strict=True)), **dict(zip(op.outputs, output, strict=True))}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        ctx.constants = {name: value for name, value in values.items() if name not in tensors}
        ctx.names = list(tensors)
        ctx.save_for_backward(*tensors.values())
        if ctx.order == 0:
            ctx.mark_non_differentiable(*output[ctx.chain.results :])  # what the op keeps for its derivatives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chain, order = ctx.chain, ctx.order
        op = chain.ops[order]
        if order + 1 == len(chain.ops):
            raise NotImplementedError(
                f"{chain.ops[0].name}: derivatives of order {order + 1} are not implemented in the compiled "
                "op; metafast.reference differentiates to any order"
            )
        values = {**ctx.constants, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}
        for name, grad in list(zip(op.outputs, grads, strict=True))[: chain.results if order == 0 else None]:
            no_gradient = values.get(_subject(name), grad) is None  # of an argument that was not given
            values[gradient_name(name)] = None if no_gradient else grad
        derivative = chain.ops[order + 1]
        wanted = [name for name, wants in zip(op.names, ctx.needs_input_grad[3:], strict=True) if wants]
        arguments = [values[name] for name in derivative.names]
        results = _Derivative.apply(chain, order + 1, tuple(wanted), *arguments)
        found = dict(zip(derivative.outputs, results, strict=True))
        of_inputs = [found.get(f"grad_{name}") if name in wanted else None for name in op.names]
        return None, None, None, *of_inputs

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Dims,
        chain: Chain,
        order: int,
        wanted: Sequence[str],
        *args: Any,
    ) -> tuple[Results, Dims]:
        folding = chain.fold(order, wanted, info.batch_size, args, in_dims[3:])
        if folding is None:
            _record(chain.ops[order].name, "reference")
            found = torch.vmap(lambda *args: _reference(chain, order, args), in_dims[3:])(*args)
            return found, (0,) * len(found)
        chain, folded, split = folding
        return split(_Derivative.apply(chain, order, wanted, *folded))


def _reference(chain: Chain, order: int, args: Sequence[Any]) -> Results:
    """What op number `order` of the chain returns, in plain PyTorch."""
    if order == 0:
        result = chain.reference(*args)
        return result if isinstance(result, tuple) else (result,)
    op, before = chain.ops[order], chain.ops[order - 1]
    values = dict(zip(op.names, args, strict=True))
    wrt = [name for name in op.inputs if f"grad_{name}" in op.outputs and values[name] is not None]
    cotangents = {name: values.get(gradient_name(name)) for name in before.outputs}
    present = [name for name, grad in cotangents.items() if grad is not None]

    def differentiated(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = {**values, **dict(zip(wrt, tensors, strict=True))}
        results = _reference(chain, order - 1, [replaced[name] for name in before.names])
        return tuple(result for name, result in zip(before.outputs, results, strict=True) if name in present)

    _, pull_back = torch.func.vjp(differentiated, *(values[name] for name in wrt))
    grads = dict(zip(wrt, pull_back(tuple(cotangents[name] for name in present)), strict=True))
    nothing = next(iter(grads.values())).new_empty(0)
    return tuple(grads.get(name.removeprefix("grad_"), nothing) for name in op.outputs)


def _record(op: str, door: str) -> None:
    if _trace is not None:
        _trace.append((op, door))


_trace: list[tuple[str, str]] | None = None


@contextmanager
def trace_doors() -> Iterator[list[tuple[str, str]]]:
    """Lists which way each call of an op takes within the `with` block, as pairs (op, door).

    The doors are "op" (fused, C++ autograd), "function" (fused, inside `torch.func.grad` and `vmap`) and
    "reference" (plain PyTorch). Costs nothing outside the block. Not for several threads at once.

    Example::

        with metafast.trace_doors() as doors:
            torch.func.grad(lambda x: metafast.pairwise_distance(x, y).sum())(x)
        assert doors == [("pairwise", "function")]
    """
    global _trace, call
    outer = _trace, call
    _trace = doors = []

    def traced(chain: Chain, *args: Any) -> Tensor:
        if not _transforms_active() and (torch.compiler.is_compiling() or forward_ad._current_level < 0):
            _record(chain.ops[0].name, "op")
        return outer[1](chain, *args)

    call = traced
    try:
        yield doors
    finally:
        _trace, call = outer
