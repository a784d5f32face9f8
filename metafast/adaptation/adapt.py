"""`adapt`: the inner loop of any `torch.nn.Module`, for all tasks.

It has three paths: `metafast.inner_sgd` or `metafast.conv_inner_sgd` where the kernels know the module
(fused.py), `torch.func` for all tasks at once (transforms.py), and plain autograd for one task after the
other (loop.py). path.py picks.

Shapes: T tasks, S support and Q query examples per task, K steps, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafast.adaptation import fused, transforms
from metafast.adaptation.errors import blamed
from metafast.adaptation.examples import Examples, at, blank_step, check_examples, leaves_of, without
from metafast.adaptation.inner_loop import InnerLoop, LearningRates, Loss, Penalty, Rates
from metafast.adaptation.path import GENERAL, Plan, plan
from metafast.adaptation.states import States, Tensors
from metafast.adaptation.structure import ConvNet, Mlp, recognise
from metafast.adaptation.task import Task
from metafast.reference.labels import IGNORED


@dataclass(frozen=True, repr=False, eq=False)
class Adapted:
    """One module for each of T tasks, as `adapt` returns it. Call it: [T, Q, ...] -> [T, Q, ...].

    The result is what the module gives for the examples of each task with that task's parameters, in the
    mode, training or evaluation, that the module is in at the call. Gradients pass through the call and
    through the adaptation. A call keeps nothing: buffers that it changes (the running statistics of batch
    norm) are changed in a copy.

    With ``statistics_of`` [T, S, ...], other examples, batch norm in training goes by the statistics of
    those under the task's parameters, so that each of x is computed by itself (not transductive). Gradients
    pass through the statistics. Such a call is not fused.

    It can be pickled, with the module and without the graph; and where it was made without a graph, under
    `torch.no_grad`, copied by `copy.deepcopy`, as torch has it with all tensors.
    """

    path: str  # "fused", "torch.func" or "loop"
    module: nn.Module  # what was adapted, as it was
    _states: States
    _known: Mlp | ConvNet | None = None  # the module as the kernels know it, on the fused path

    @property
    def tasks(self) -> int:
        """T."""
        return self._states.tasks

    @property
    def params(self) -> Tensors:
        """Those that adapted, by their names, each [T, ...]."""
        return self._states.stacked()[0]

    @property
    def buffers(self) -> Tensors:
        """By their names, each [T, ...]; empty where the fused path runs an MLP."""
        return self._states.stacked()[1]

    def __call__(self, x: Examples, *, statistics_of: Tensor | None = None) -> Any:
        check_examples("x", x, "T, Q", T=self.tasks)
        if statistics_of is not None:
            together, first = self._behind(statistics_of, x)
            return tree_map(lambda leaf: leaf[:, first[0] :], self._call(together, first))
        if (known := self._network(x)) is not None:
            return fused.call(known, self._states.stacked(), x)
        return self._call(x)

    def _call(self, x: Examples, by_first: tuple[int, int] | None = None) -> Any:
        """On a general path."""
        _refuse_no_tasks(self.tasks)
        task = Task(self.module, InnerLoop(), self._states, by_first)
        return blamed(
            "torch.func" if self.path == "fused" else self.path,
            task,
            at(x, 0),
            lambda: GENERAL.get(self.path, transforms).call(task, self._states, x),
            lambda: task.call(*self._states.each()[0], at(x, 0)),
        )

    def _behind(self, first: Tensor, x: Examples) -> tuple[Tensor, tuple[int, int]]:
        """x behind other examples, how many these are, and of how many."""
        check_examples("statistics_of", first, "T, S", T=self.tasks)
        if not isinstance(first, Tensor) or not isinstance(x, Tensor):
            kinds = f"{type(first).__name__} beside {type(x).__name__}"
            raise TypeError(f"statistics_of: expected a tensor beside a tensor x, got {kinds}")
        if first.shape[2:] != x.shape[2:] or first.dtype != x.dtype:
            expected = f"{list(x.shape[2:])} of {x.dtype} as in x"
            raise ValueError(
                f"statistics_of: expected examples {expected}, got {list(first.shape[2:])} of {first.dtype}"
            )
        return torch.cat([first, x], 1), (first.shape[1], first.shape[1] + x.shape[1])

    def _network(self, x: Examples) -> Mlp | ConvNet | None:
        """The module as the kernels know it, as it is at this call."""
        known = self._known
        if known is None or known.still():
            return known
        found = recognise(self.module, set(self.params), x) if isinstance(x, Tensor) else ""
        return found if isinstance(found, type(known)) and [*found.params] == [*known.params] else None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in self.params.items())
        return f"Adapted({self.path}: {shapes})"


def adapt(
    module: nn.Module | Adapted,
    x: Examples,
    y: Examples,
    *,
    loss: Loss,
    lr: Rates,
    steps: int,
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    params: str | Iterable[str] | None = None,
    example_weights: Tensor | None = None,
    per_step: bool = False,
    max_norm: float | Tensor | None = None,
    penalty: Penalty | None = None,
    checkpoint_steps: bool = False,
    path: str | None = None,
) -> Adapted:
    """Trains a copy of a module for each task with `steps` steps of SGD.

    The module itself does not change: the tasks run on a structural copy of it. There are three paths:

    ``"fused"``
        For a chain of layers of these two kinds, behind what does not adapt; or a module whose forward runs
        such a chain, and whose code refers to nothing else. No graph; differentiable once.

        - `metafast.inner_sgd`: `torch.nn.Linear` with ReLU, Tanh or nothing between (1 to 8 layers, with
          biases).
        - `metafast.conv_inner_sgd`: blocks of `Conv2d` (without groups and dilation), `BatchNorm2d` by the
          statistics of the batch or none, and, in either order, ReLU or Tanh or none and `MaxPool2d`,
          `AvgPool2d` or none; then `Flatten`, perhaps after a mean over the image (`AdaptiveAvgPool2d(1)`);
          then `Linear`, one or more.
    ``"torch.func"``
        All tasks at once, by `vmap` over `grad`, for modules that these take: no branch on a value, no
        write in place into what is not the task's. The backward holds the graph of all steps, unless
        `checkpoint_steps` says otherwise. Differentiable to any order.
    ``"loop"``
        One task after the other, by `torch.autograd.grad`, for any module; its time grows with T. The
        backward holds the graph of all steps, unless `checkpoint_steps` says otherwise; where there is none
        (first order, or under `torch.no_grad`) the memory is one task's.

    By default the first that knows the module, or of the other two what bench/networks.py measured as the
    faster for the device and the layers; `explain` tells which, and why.

    Args:
        module: What is adapted: its parameters that require grad. Or an `Adapted`, whose tasks go on from
            where they are (with new momentum).
        x: [T, S, ...]: the module is called with the [S, ...] of a task. Or a tree of such tensors: a tuple
            is the module's arguments, a dict its keywords.
        y: [T, S, ...], targets; with a function as loss, a tree of tensors as well.
        loss: ``"mse"``, the mean over a task's examples and outputs; ``"cross_entropy"``, the mean over its
            examples that are not labelled -100 (a task without any is not adapted); or a function of one
            task's outputs and targets that returns a scalar tensor.
        lr: The learning rate: a number or a tensor [] (which may have a gradient); one of these, or a tensor
            that broadcasts to the parameter, for each parameter that adapts, as a sequence in their order or
            as a dict by their names (Meta-SGD, Li et al. 2017); or a tensor [K, L], of each step and each
            layer with parameters that adapt, in their order (Antoniou et al. 2019).
        steps: K, from 0 on.
        first_order: Whether the backward takes the inner gradients as constants (Nichol et al. 2018).
        momentum, weight_decay, nesterov: As in `torch.optim.SGD`; the last two not on the fused path.
        params: Names, or prefixes of names ("head" for head.weight and head.bias), of the parameters that
            adapt, the others being shared by all tasks (ANIL, Raghu et al. 2020, adapts the head alone). By
            default all that require grad.
        example_weights: [T, S], for the named losses, which become weighted means: sum(w * loss) / sum(w),
            and 0 where all weights are. An example of weight 0 is left out, whatever it holds (what mixes
            examples, batch norm in training, sees zeros in its place); its weight has no gradient, the
            others' have.
        per_step: Whether x, y and example_weights have a dimension of the steps before the tasks',
            [K, T, S, ...]: a batch of its own for each step. On the fused path without momentum.
        max_norm: Clips the gradient of each task and step to this norm, as
            `torch.nn.utils.clip_grad_norm_`. Not on the fused path.
        penalty: A function of a task's parameters and of those it began with, both by name, that returns a
            scalar, which is added to the loss: a proximal term. Not on the fused path.
        checkpoint_steps: Whether each step keeps its parameters, momenta and buffers alone, and runs again in
            the backward, to the same bits: the memory of one step's graph in place of K (203 MiB in place of
            396 for a narrow ResNet-12 at K = 5), and each step's forward twice. The module, loss and penalty
            may use no other tensor with a gradient. On the fused path it changes nothing: no step keeps more.
        path: One of the three, to have that or an error that says why not.

    Returns:
        An `Adapted`: its `params` (name -> [T, ...]), and a call, [T, Q, ...] -> [T, Q, ...]. Gradients reach
        the parameters of the module, adapted or shared, `lr`, `x`, a float `y` and what else is a tensor:
        once on the fused path, to any order on the others.

    In training mode, batch norm uses the statistics of the task's batch, and each task has its own running
    statistics, which start from the module's and follow its steps (`Adapted.buffers`); the module's stay as
    they are. In evaluation mode a call goes by those. Dropout draws anew for each task and step. Batch norm,
    layer norm, attention and embeddings run in elementary operations, since torch's own have wrong second
    derivatives under `vmap` or none. Under autocast the fused path adapts in float32, on CUDA with
    convolutions that multiply in autocast's dtype (`metafast.conv_inner_sgd`); on "torch.func", autocast
    reaches what `vmap` lets it reach.

    Raises:
        ValueError: a shape or an option does not fit, no parameter adapts, or the module is not one that
            `path` takes (the message names the layer).
        TypeError: a dtype does not fit; the parameters that adapt are float32 or float64.
        NotImplementedError: a result of the fused path is differentiated twice.

    Equivalent to::

        for t in range(T):
            theta = dict(module.named_parameters())
            for _ in range(steps):
                value = loss(torch.func.functional_call(module, theta, (x[t],)), y[t])
                grads = torch.autograd.grad(value, list(theta.values()), create_graph=not first_order)
                theta = {name: p - lr * g for (name, p), g in zip(theta.items(), grads)}

    Example::

        adapted = metafast.adapt(model, support_x, support_y, loss="cross_entropy", lr=0.4, steps=5)
        F.cross_entropy(adapted(query_x).flatten(0, 1), query_y.flatten()).backward()
        meta_optimizer.step()
    """
    inner = InnerLoop(
        loss=loss,
        steps=steps,
        first_order=first_order,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        per_step=per_step,
        max_norm=max_norm,
        penalty=penalty,
        weighted=example_weights is not None,
        checkpoint_steps=checkpoint_steps,
        layered=isinstance(lr, Tensor) and lr.dim() > 0,
    )
    inner.check()
    before = module if isinstance(module, Adapted) else None
    if before is not None:
        module = before.module
        if params is not None:
            raise ValueError("params: expected None for an Adapted, which goes on with those that it has")
        params = list(before.params)
    tasks = _check_examples(x, y, example_weights, inner, before)
    if per_step and steps == 0:  # there is no batch, and none is needed
        inner.per_step = per_step = False
        x, y, example_weights = map(blank_step, (x, y, example_weights))
    if example_weights is not None:
        counts = example_weights != 0
        x, y = without(x, counts), without(y, counts, IGNORED if loss == "cross_entropy" else 0)
        example_weights = torch.where(counts, example_weights, 0)  # no gradient reaches those that are 0
    found = plan(module, inner, params, path, x)
    rates = LearningRates(lr, found.params, steps)
    if found.known is not None:
        theta = found.params if before is None else before.params
        start = _start(module, found, before, tasks).stacked()
        buffers = start[1] if isinstance(found.known, ConvNet) else {}
        moved, buffers = fused.train(
            found.known, (theta, buffers), inner, rates, found.features, y, example_weights
        )
        ends = {name: moved.get(name, at_first) for name, at_first in start[0].items()}  # some may not run
        return Adapted("fused", module, States(tasks, (ends, buffers)), found.known)
    _refuse_no_tasks(tasks)
    start = _start(module, found, before, tasks)
    task, given = Task(module, inner, start), (x, y, example_weights)
    ends = blamed(
        found.path,
        task,
        at(x, *[0] * (1 + per_step)),
        lambda: GENERAL[found.path].train(task, start, rates, *given),
        lambda: _plain(task, start, *given),
    )
    return Adapted(found.path, module, ends)


def _check_examples(
    x: Examples, y: Examples, weights: Tensor | None, inner: InnerLoop, before: Adapted | None
) -> int:
    """T, if all have it."""
    lead, steps = ("K, T, S", inner.steps) if inner.per_step else ("T, S", None)
    tasks = check_examples("x", x, lead, K=steps, T=None if before is None else before.tasks)
    if isinstance(inner.loss, str) and not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor for loss={inner.loss!r}, got {type(y).__name__}")
    check_examples("y", y, lead, K=steps, T=tasks)
    if weights is not None:
        check_examples("example_weights", weights, lead, K=steps, T=tasks)
        shape = next(iter(leaves_of(x))).shape[: weights.dim()]
        if weights.shape != shape or not weights.is_floating_point():
            got = f"{list(weights.shape)} of {weights.dtype}"
            raise ValueError(f"example_weights: expected floats of shape [{lead}] = {list(shape)}, got {got}")
        check_examples("y", y, lead, K=steps, T=tasks, S=shape[-1])
    return tasks


def _start(module: nn.Module, plan: Plan, before: Adapted | None, tasks: int) -> States:
    """Where the tasks begin: the module's, or where they are."""
    if before is None or not before.buffers:
        shared = States.shared(plan.params, dict(module.named_buffers()), tasks)
        return shared if before is None else States(tasks, (before.params, shared.stacked()[1]))
    return before._states


def _plain(task: Task, start: States, x: Examples, y: Examples, weights: Tensor | None) -> None:
    """One step of the first task without a transform, to see whether it can be taken."""
    examples = (x, y) if weights is None else (x, y, weights)
    params, buffers = start.each()[0]
    create_graph = torch.is_grad_enabled() and not task.inner.first_order
    leaves = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        value, _ = task.loss(leaves, buffers, leaves, *at(examples, *[0] * (1 + task.inner.per_step)))
        if value.requires_grad:
            torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, allow_unused=True)


def _refuse_no_tasks(tasks: int) -> None:
    if tasks == 0:
        raise ValueError("x: expected a task or more, got none; only the fused path takes none")
