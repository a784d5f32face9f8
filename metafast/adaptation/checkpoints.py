"""Steps of an inner loop that keep their inputs alone and run again in the backward (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states


class NotCheckpointedError(ValueError):
    """The step cannot run again in the backward."""


def checkpointed(step: Callable[..., Any], *given: Any) -> Any:
    """``step(*given)``, trees of tensors from trees of tensors, which keeps of its graph nothing but `given`.

    Raises:
        NotCheckpointedError: the step uses a tensor with a gradient that is not given.
    """
    leaves, shape = tree_flatten(given)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    shapes = []

    def of_tensors(tensors: Sequence[Tensor]) -> list[Any]:
        values = list(constants)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        results, shape_of_results = tree_flatten(step(*tree_unflatten(values, shape)))
        shapes.append(shape_of_results)
        return results

    results = _Step.apply(of_tensors, *tensors)
    return tree_unflatten(list(results), shapes[0])


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Callable[[Sequence[Tensor]], list[Any]], *tensors: Tensor) -> tuple[Any, ...]:
        ctx.step, ctx.conditions = step, _Conditions(tensors)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[1:]
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        with torch.enable_grad():
            results = step(leaves)
        _refuse_others(results, leaves)
        results = [r.detach() if isinstance(r, Tensor) else r for r in results]
        ctx.mark_non_differentiable(
            *(r for r in results if isinstance(r, Tensor) and not r.is_floating_point())
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the step as it was run, now with its graph; where that is to be differentiated again, as a part
        of the graph that there is."""
        again, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[1:]

        def own(tensor: Tensor, want: bool) -> Tensor:
            """One for each place: a tensor in two of them gets from each what reaches it there."""
            if not want:
                return tensor.detach()
            return tensor.view_as(tensor) if again else tensor.detach().requires_grad_()

        with torch.enable_grad(), ctx.conditions.restored():
            tensors = [own(*pair) for pair in zip(ctx.saved_tensors, wanted, strict=True)]
            results = ctx.step(tensors)
        reached = [pair for pair in zip(results, grads, strict=True) if pair[1] is not None]
        reached = [(result, grad) for result, grad in reached if result.requires_grad]
        if not reached:
            return (None,) * (1 + len(tensors))
        of, along = zip(*reached, strict=True)
        inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(of, inputs, along, create_graph=again, allow_unused=True))
        return None, *(next(found) if want else None for want in wanted)


class _Conditions:
    """What a step depends on besides its tensors: the state of the random numbers, and of autocast."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._numbers = torch.get_rng_state()
        self._of_devices = get_device_states(*tensors)
        self._device = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        devices, states = self._of_devices
        enabled, dtype = self._autocast
        with torch.random.fork_rng(devices), torch.autocast(self._device, dtype, enabled):
            torch.set_rng_state(self._numbers)
            set_device_states(devices, states)
            yield


def _refuse_others(results: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    """Raises where the graph of the results has other leaves: their gradient would be lost."""
    known, seen = {id(leaf) for leaf in leaves}, set()
    nodes = [r.grad_fn for r in results if isinstance(r, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise NotCheckpointedError(
                "checkpoint_steps: expected a module, a loss and a penalty whose tensors with a gradient are "
                "the module's parameters, lr, x, y and example_weights; got another, of shape "
                f"{list(variable.shape)}, whose gradient would be lost"
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)
