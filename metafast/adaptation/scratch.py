"""A module's double, which runs with other tensors in the place of its own.

To run a module with the parameters of a task, `torch.func.functional_call` puts them into the module itself
for the time of the call: another thread then runs with them too, an interrupt leaves them there, and what the
module keeps of a call as an attribute outlives it. A `Scratch` is a structural copy for one inner loop: other
objects and dictionaries, the same tensors. What runs in it does not reach the caller's module.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metafast.adaptation.examples import Examples, arguments_of
from metafast.adaptation.states import Tensors


class _Place(NamedTuple):
    """Where the module holds a tensor: in which of its parts, and in which dictionary by which key."""

    part: int
    group: str  # "_parameters" or "_buffers"
    key: str


class Scratch:
    """A copy of a module, to be called with parameters and buffers in the place of the module's.

    In a graph that `torch.compile` traces it is the module itself, which `functional_call` runs there as a
    function that leaves nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        copier = _Copier()
        self._copied = not torch.compiler.is_compiling()
        self.module = copier.copy_module(module) if self._copied else module
        self._renewed_by_parts = copier.modules_alone
        self._places: dict[str, list[_Place]] = {}  # by each name of a tensor, all its places
        self._names: dict[_Place, str] = {}
        self._parts: list[nn.Module] = []
        places: dict[int, tuple[Tensor, list[_Place]]] = {}
        for number, (prefix, part) in enumerate(self.module.named_modules()):
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
                got = f"{called(prefix, part)} with True"
                raise ValueError(f"module: expected embeddings with sparse=False, got {got}")
            self._parts.append(part)
            for group, key, tensor in _tensors_of(part):
                place, name = _Place(number, group, key), f"{prefix}.{key}" if prefix else key
                _, self._places[name] = places.setdefault(id(tensor), (tensor, []))
                self._places[name].append(place)
                self._names[place] = name

    def call(self, tensors: Tensors, x: Examples) -> Any:
        """What the module makes of the examples with these tensors, into which it may write."""
        args, kwargs = arguments_of(x)
        if not self._copied:
            tied = {self._names[p]: tensor for name, tensor in tensors.items() for p in self._places[name]}
            return torch.func.functional_call(self.module, tied, args, kwargs, tie_weights=False)
        self.place(tensors)
        return self.module(*args, **kwargs)

    def place(self, tensors: Tensors) -> None:
        """Puts these tensors where the module has those of their names."""
        for name, tensor in tensors.items():
            for place in self._places[name]:
                part = self._parts[place.part]
                if isinstance(part, torch.jit.ScriptModule):
                    part._c.setattr(place.key, tensor)
                else:
                    getattr(part, place.group)[place.key] = tensor

    def buffers(self, given: Tensors) -> Tensors:
        """What a call has left of the buffers it was given: those it wrote into, or others that it set."""
        if not self._copied:
            return given
        return {name: getattr(self._parts[p.part], p.key) for name in given for p in self._places[name][:1]}

    def renew(self) -> None:
        """Goes on with a copy of the copy: what will run again for the backward, as `torch.utils.checkpoint`
        does, has the one of its call, with the tensors of that."""
        if not self._renewed_by_parts:
            self.module = _Copier().copy_module(self.module)
            self._parts = list(self.module.modules())
            return
        doubles = {id(part): object.__new__(type(part)) for part in self._parts}
        for part in self._parts:
            own = vars(part)
            modules = {name: doubles.get(id(child)) for name, child in own["_modules"].items()}
            vars(doubles[id(part)]).update(
                own
                | {"_parameters": {**part._parameters}, "_buffers": {**part._buffers}, "_modules": modules}
            )
        self.module, self._parts = doubles[id(self.module)], list(doubles.values())

    def culprit(self, error: BaseException) -> str | None:
        """The innermost layer in whose forward the error was raised, for a message."""
        names = {id(part): name for name, part in self.module.named_modules()}
        found, trace = None, error.__traceback__
        while trace is not None:
            part = trace.tb_frame.f_locals.get("self")
            if id(part) in names:
                found = called(names[id(part)], part)
            trace = trace.tb_next
        return found


def structural_copy(module: nn.Module) -> nn.Module:
    """Other modules and dictionaries, the same tensors."""
    return _Copier().copy_module(module)


def called(name: str, part: nn.Module) -> str:
    """A layer, for a message."""
    return f"{f'layer {name!r}' if name else 'the module'} ({type(part).__name__})"


def _tensors_of(part: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors that this part itself holds, and where."""
    parameters, buffers = part.named_parameters(recurse=False), part.named_buffers(recurse=False)
    yield from (("_parameters", key, tensor) for key, tensor in parameters)
    yield from (("_buffers", key, tensor) for key, tensor in buffers)


class _Copier:
    """Copies modules, and whatever of Python's own containers and functions refers to them.

    Tensors, and objects of other kinds, are shared.
    """

    _ATOMS = frozenset({type(None), bool, int, float, str, Tensor, nn.Parameter})
    _MAPPINGS = frozenset({dict, OrderedDict})
    _SEQUENCES = frozenset({list, tuple, set, deque})

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        self.modules_alone = True  # whether nothing but modules refers to modules

    def copy_module(self, module: nn.Module) -> nn.Module:
        if (found := self._copies.get(id(module))) is not None:
            return found
        if isinstance(module, torch.jit.ScriptModule):
            return self._copy_script(module)
        double = self._copies[id(module)] = object.__new__(type(module))
        attributes = vars(double)
        for name, value in vars(module).items():
            if name == "_modules":
                attributes[name] = {key: child and self.copy_module(child) for key, child in value.items()}
            else:
                attributes[name] = self.copy(value)
        if isinstance(module, DistributedDataParallel):
            double.broadcast_buffers = False  # those of the tasks are each process's own
        return double

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._ATOMS:
            return value
        if kind in self._MAPPINGS:
            return kind((key, self.copy(item)) for key, item in value.items()) if value else kind()
        if kind in self._SEQUENCES:
            return kind(self.copy(item) for item in value) if value else kind()
        if kind is defaultdict:
            return defaultdict(value.default_factory, ((key, self.copy(item)) for key, item in value.items()))
        if isinstance(value, nn.Module):
            self.modules_alone = False
            return self.copy_module(value)
        return self._copy_callable(value)

    def _copy_callable(self, value: Any) -> Any:
        """A function that knows a module, as another that knows its copy."""
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if type(value) is functools.partial:
            function, args, keywords = (self.copy(x) for x in (value.func, value.args, value.keywords))
            return functools.partial(function, *args, **keywords)
        if not isinstance(value, types.FunctionType) or not value.__closure__:
            return value
        if (found := self._copies.get(id(value))) is not None:
            return found
        self._copies[id(value)] = value  # for a function that knows itself
        cells = [self._copy_cell(cell) for cell in value.__closure__]
        if all(one is other for one, other in zip(cells, value.__closure__, strict=True)):
            return value
        double = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
        )
        double.__kwdefaults__ = value.__kwdefaults__
        self._copies[id(value)] = double
        return functools.update_wrapper(double, value)

    def _copy_cell(self, cell: types.CellType) -> types.CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            return cell
        known = isinstance(content, (nn.Module, types.MethodType, types.FunctionType, functools.partial))
        double = self.copy(content) if known else content
        return cell if double is content else types.CellType(double)

    def _copy_script(self, module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        """Its structure is TorchScript's, which copies the tensors too; the module's take their place."""
        self.modules_alone = False
        double = self._copies[id(module)] = copy.deepcopy(module)
        for part, original in zip(double.modules(), module.modules(), strict=True):
            for _, key, tensor in _tensors_of(original):
                part._c.setattr(key, tensor)
        return double
