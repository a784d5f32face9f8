"""`adapt`: the inner loop of any `torch.nn.Module`, for all tasks at once.

Where the kernels know the module it is `metafast.inner_sgd`, elsewhere `torch.func`: `functional_call` and
`vmap(grad)` over tasks, and `metafast.sgd_update` between the steps. `explain` says which, and why.

Shapes: T tasks, S support and Q query examples per task, K steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast._dispatch.arguments import check_not_negative
from metafast.adaptation import transformable
from metafast.adaptation.structure import Mlp, recognise
from metafast.ops.inner_loop import inner_sgd, sgd_update, task_linear
from metafast.reference.labels import IGNORED, checked_labels

Loss = str | Callable[[Tensor, Tensor], Tensor]
Rates = float | Tensor | Sequence[float | Tensor] | Mapping[str, float | Tensor]
Tensors = dict[str, Tensor]

_has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
_DEVICES = [key.lower() for key in ("CPU", "CUDA") if _has_kernel("metafast::inner_sgd", key)]


@dataclass(frozen=True)
class Explanation:
    """Which path `adapt` takes for a module, and why. Printing it gives a few lines."""

    path: str  # "fused" or "torch.func"
    reason: str
    adapts: dict[str, tuple[int, ...]]  # the names and shapes of the parameters that each task has its own of
    shares: tuple[str, ...]  # the names of those that all tasks share

    def __str__(self) -> str:
        how = "metafast.inner_sgd" if self.path == "fused" else "vmap(grad(functional_call)) over tasks"
        lines = [f"{self.path}: {how}; {self.reason}"]
        lines += [f"  adapts {name} {list(shape)}" for name, shape in self.adapts.items()]
        lines += [f"  shares {name}" for name in self.shares]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Adapted:
    """One module for each of T tasks, as `adapt` returns it. Call it: [T, Q, ...] -> [T, Q, ...].

    The result is what the module gives for the examples of each task with that task's parameters, in the
    mode, training or evaluation, that the module is in at the call. Gradients pass through the call and
    through the adaptation. A call keeps nothing: buffers that it changes (the running statistics of batch
    norm) are changed in a copy.

    It can be pickled, with the module and without the graph; and where it was made without a graph, under
    `torch.no_grad`, copied by `copy.deepcopy`, as torch has it with all tensors.
    """

    params: Tensors  # name -> [T, ...], of those that adapted
    buffers: Tensors  # name -> [T, ...]; empty on the fused path
    path: str  # "fused" or "torch.func"
    _module: Mlp | nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self._module, Mlp):
            return _call_mlp(self._module, list(self.params.values()), x)
        return _call_by_transforms(self._module, self.params, self.buffers, x)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in self.params.items())
        return f"Adapted({self.path}: {shapes})"


@dataclass(frozen=True)
class _Plan:
    params: dict[str, nn.Parameter]  # those that adapt
    mlp: Mlp | None  # the module as the kernels know it
    features: Tensor | None  # what the body of that makes of the input
    reason: str

    @property
    def path(self) -> str:
        return "torch.func" if self.mlp is None else "fused"


def adapt(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss,
    lr: Rates,
    steps: int,
    first_order: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    params: str | Iterable[str] | None = None,
    fused: bool | None = None,
) -> Adapted:
    """Trains a copy of a module for each task with `steps` steps of full-batch SGD, all tasks at once.

    The module itself does not change. A linear chain of `torch.nn.Linear` with ReLU, Tanh or nothing between
    (1 to 8 layers, with biases), behind what does not adapt, is trained by `inner_sgd`; every other module
    through `torch.func`, which holds the graph of all steps for the backward. `explain` tells which.

    Args:
        module: What is adapted: its parameters that require grad.
        x: [T, S, ...]: the module is called with the [S, ...] of a task.
        y: [T, S, ...], targets.
        loss: ``"mse"``, the mean over a task's examples and outputs; ``"cross_entropy"``, the mean over its
            examples that are not labelled -100 (a task without any is not adapted); or a function of one
            task's outputs and targets that returns a scalar tensor.
        lr: The learning rate: a number or a tensor [] (which may have a gradient); one of these, or a tensor
            that broadcasts to the parameter, for each parameter that adapts, as a sequence in their order or
            as a dict by their names (Meta-SGD, Li et al. 2017); on the fused path also a tensor [K, L], of
            each step and layer (Antoniou et al. 2019).
        steps: K, from 0 on.
        first_order: Whether the backward takes the inner gradients as constants (Nichol et al. 2018).
        momentum, weight_decay, nesterov: As in `torch.optim.SGD`; the last two not on the fused path.
        params: Names, or prefixes of names ("head" for head.weight and head.bias), of the parameters that
            adapt, the others being shared by all tasks (ANIL, Raghu et al. 2020, adapts the head alone). By
            default all that require grad.
        fused: True to insist on the fused path, False on the other, which is differentiable to any order.

    Returns:
        An `Adapted`: its `params` (name -> [T, ...]), and a call, [T, Q, ...] -> [T, Q, ...]. Gradients reach
        the parameters of the module, adapted or shared, `lr`, `x` and a float `y`: once on the fused path,
        to any order on the other.

    In training mode, batch norm uses the statistics of the task's batch, and each task has its own running
    statistics, which start from the module's and follow its steps (`Adapted.buffers`); the module's stay as
    they are. Dropout draws anew for each task and step. Batch norm, layer norm and attention run in
    elementary operations, since torch's fused ones have wrong second derivatives under `vmap` or none. Under
    autocast the fused path adapts in float32; on the other, autocast reaches what `vmap` lets it reach.

    Raises:
        ValueError: a shape or an option does not fit, no parameter adapts, or `fused` is True and the module
            is not one that the kernels know (the message says why).
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
    _check_arguments(x, y, loss, steps)
    check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    plan = _plan(module, loss, params, weight_decay, nesterov, x, fused)
    rates = _rates(lr, plan, steps)
    if plan.mlp is not None:
        return _adapt_fused(plan, y, loss, rates, steps, first_order, momentum)
    sgd = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    return _adapt_by_transforms(module, plan.params, x, y, loss, rates, steps, first_order, sgd)


def explain(
    module: nn.Module,
    x: Tensor | None = None,
    *,
    loss: Loss = "cross_entropy",
    weight_decay: float = 0.0,
    nesterov: bool = False,
    params: str | Iterable[str] | None = None,
) -> Explanation:
    """Which path `adapt` takes for a module and these options, why, and what adapts.

    Args:
        module, loss, weight_decay, nesterov, params: as for `adapt`.
        x: [T, S, ...], what `adapt` is to have; without it, what the first Linear has is taken to be
            [T, S, D].

    Example::

        >>> print(metafast.explain(nn.Sequential(nn.Flatten(), nn.Linear(784, 5))))
        fused: metafast.inner_sgd; the kernels know Linear 784-5, behind what does not adapt (Flatten)
          adapts 1.weight [5, 784]
          adapts 1.bias [5]
    """
    with torch.no_grad():
        plan = _plan(module, loss, params, weight_decay, nesterov, x, None)
    shares = tuple(name for name, _ in module.named_parameters() if name not in plan.params)
    adapts = {name: tuple(p.shape) for name, p in plan.params.items()}
    return Explanation(plan.path, plan.reason, adapts, shares)


# --- the path -------------------------------------------------------------------------------------------


def _plan(
    module: nn.Module,
    loss: Loss,
    params: str | Iterable[str] | None,
    weight_decay: float,
    nesterov: bool,
    x: Tensor | None,
    fused: bool | None,
) -> _Plan:
    adapted = _adapted(module, params)
    found, features = "it is not wanted", None
    if fused is not False:
        found = _recognise(module, adapted, loss, weight_decay, nesterov)
    if isinstance(found, Mlp) and x is not None:
        features = found.features(x)
        if features.dim() != 3:
            found = f"a Linear has {list(features.shape)} before it, and the kernels know [T, S, D]"
    if isinstance(found, Mlp):
        return _Plan(found.params, found, features, f"the kernels know {found}")
    if fused:
        raise ValueError(f"fused: expected a module and options that the kernels know, but {found}")
    return _Plan(adapted, None, None, found)


def _recognise(
    module: nn.Module,
    adapted: dict[str, nn.Parameter],
    loss: Loss,
    weight_decay: float,
    nesterov: bool,
) -> Mlp | str:
    for name, value in (("weight_decay", weight_decay), ("nesterov", nesterov)):
        if value:
            return f"the kernels have no {name}"
    if not isinstance(loss, str):
        return "the loss is a function of the caller"
    found = recognise(module, set(adapted))
    if isinstance(found, str):
        return found
    weight = next(iter(found.params.values()))
    if weight.device.type not in _DEVICES:
        return f"the kernels do not run on {weight.device.type}"
    return found


def _adapted(module: nn.Module, params: str | Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that adapt, by their names."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if params is not None:
        asked = [params] if isinstance(params, str) else list(params)
        for one in asked:
            if not any(_names(one, name) for name in trained):
                raise ValueError(
                    f"params: expected names of parameters that require grad, or prefixes, got {one!r}; "
                    f"there are {', '.join(trained) or 'none'}"
                )
        trained = {name: p for name, p in trained.items() if any(_names(one, name) for one in asked)}
    if not trained:
        raise ValueError("module: expected a parameter that requires grad and adapts, got none")
    for name, param in trained.items():
        if param.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"module: expected parameters of dtype float32 or float64, got {param.dtype} in {name}; "
                "SGD's small steps are lost in fewer bits, torch.autocast runs the rest in 16"
            )
    return trained


def _names(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _check_arguments(x: Tensor, y: Tensor, loss: Loss, steps: int) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [T, S, ...], got {list(x.shape)}")
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"y: expected shape [T, S, ...] with T = {x.shape[0]}, got {list(y.shape)}")
    if steps < 0:
        raise ValueError(f"steps: expected a number >= 0, got {steps}")
    if not callable(loss) and loss not in tuple(_LOSSES):
        raise ValueError(f"loss: expected 'mse', 'cross_entropy' or a function, got {loss!r}")


def _rates(lr: Rates, plan: _Plan, steps: int) -> float | Tensor | list[Tensor]:
    """lr as `sgd_update` and `inner_sgd` take it; on the fused path of the shapes of the parameters."""
    if isinstance(lr, Tensor) and lr.dim():
        layers = len(plan.params) // 2
        if plan.mlp is None:
            raise ValueError(
                "lr: expected a number, a tensor [], or one for each parameter; [K, L] needs the fused path, "
                f"and {plan.reason}; got shape {list(lr.shape)}"
            )
        if lr.shape != (steps, layers):
            raise ValueError(f"lr: expected shape [K, L] = [{steps}, {layers}], got {list(lr.shape)}")
        return lr
    if not isinstance(lr, Iterable) or isinstance(lr, Tensor):
        return lr
    if hasattr(lr, "items"):  # a dict, or a ParameterDict
        given = dict(lr.items())
        if set(given) != set(plan.params):
            wrong = ", ".join(sorted(set(given) ^ set(plan.params)))
            raise ValueError(f"lr: expected one for each of {', '.join(plan.params)}; check {wrong}")
        values = [given[name] for name in plan.params]
    else:
        values = list(lr)
        if len(values) != len(plan.params):
            raise ValueError(f"lr: expected one for each of {', '.join(plan.params)}, got {len(values)}")
    return [
        _rate(value, name, param, fused=plan.mlp is not None)
        for value, (name, param) in zip(values, plan.params.items(), strict=True)
    ]


def _rate(value: float | Tensor, name: str, param: nn.Parameter, *, fused: bool) -> Tensor:
    if not isinstance(value, Tensor):
        check_not_negative(lr=value)
        value = torch.full((), value, dtype=param.dtype, device=param.device)
    try:
        expanded = value.expand(param.shape)
    except RuntimeError:
        shapes = f"{list(param.shape)}, got {list(value.shape)}"
        raise ValueError(f"lr: expected for {name} what broadcasts to its shape, {shapes}") from None
    return expanded if fused else value  # sgd_update broadcasts by itself


# --- fused ----------------------------------------------------------------------------------------------


def _adapt_fused(
    plan: _Plan,
    y: Tensor,
    loss: str,
    lr: float | Tensor | list[Tensor],
    steps: int,
    first_order: bool,
    momentum: float,
) -> Adapted:
    mlp = plan.mlp
    name, weight = next(iter(mlp.params.items()))
    if plan.features.shape[-1] != weight.shape[1]:
        shapes = f"{list(weight.shape)}, got {list(plan.features.shape)}"
        raise ValueError(f"x: expected examples of as many features as {name} takes, {shapes}")
    if plan.features.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"x: expected the dtype of {name}, {weight.dtype}, got {plan.features.dtype}")
    found = inner_sgd(
        list(mlp.params.values()),
        plan.features,
        y,
        loss=loss,
        lr=lr,
        steps=steps,
        activation=mlp.activation,
        momentum=momentum,
        first_order=first_order,
    )
    return Adapted(dict(zip(mlp.params, found, strict=True)), {}, "fused", mlp)


def _call_mlp(mlp: Mlp, theta: list[Tensor], x: Tensor) -> Tensor:
    activation = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}[mlp.activation]
    x = mlp.features(x)
    for i in range(0, len(theta), 2):
        x = task_linear(activation(x) if i else x, theta[i], theta[i + 1])
    return x


# --- torch.func -----------------------------------------------------------------------------------------


def _adapt_by_transforms(
    module: nn.Module,
    params: dict[str, nn.Parameter],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    lr: float | Tensor | list[Tensor],
    steps: int,
    first_order: bool,
    sgd: dict[str, float | bool],
) -> Adapted:
    of_one_task = _LOSSES[loss] if isinstance(loss, str) else loss

    def task_loss(theta: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
        out, buffers = _call_of_task(module, theta, buffers, x)
        value = of_one_task(out, y)
        if value.dim():
            raise ValueError(f"loss: expected a function that returns a scalar, got {list(value.shape)}")
        return value, buffers

    tasks = x.shape[0]
    if tasks == 0:
        raise ValueError("x: expected a task or more, got none; torch's vmap has nothing to run over then")
    theta: Tensors = {name: p.expand(tasks, *p.shape) for name, p in params.items()}
    buffers: Tensors = {name: b.expand(tasks, *b.shape) for name, b in module.named_buffers()}
    gradient = torch.vmap(torch.func.grad(task_loss, has_aux=True), randomness="different")
    momenta: list[Tensor] | None = None
    for _ in range(steps):
        with torch.no_grad() if first_order else nullcontext():  # torch.func.grad works in either
            grads, buffers = gradient(theta, buffers, x, y)
        updated, momenta = sgd_update(
            list(theta.values()), [grads[name] for name in theta], lr, momentum_buffers=momenta or None, **sgd
        )
        theta = dict(zip(theta, updated, strict=True))

    return Adapted(theta, buffers, "torch.func", module)


def _call_by_transforms(module: nn.Module, theta: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    of_tasks = transformable.vmap_without_gradient(module, lambda *args: _call_of_task(module, *args)[0])
    return of_tasks(theta, buffers, x)


def _call_of_task(module: nn.Module, theta: Tensors, buffers: Tensors, x: Tensor) -> tuple[Tensor, Tensors]:
    """The output of the module for one task, and the buffers that it leaves."""
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm writes into them
    try:
        return transformable.call(module, {**theta, **buffers}, x), buffers
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, not implemented
            raise
        raise ValueError(
            f"x: expected examples that the module takes; on those of a task, {list(x.shape)} of "
            f"{x.dtype}, it raised: {error}"
        ) from error


def _mse(out: Tensor, y: Tensor) -> Tensor:
    if out.shape != y.shape:
        raise ValueError(f"y: expected the shape of a task's outputs, {list(out.shape)}, got {list(y.shape)}")
    return F.mse_loss(out, y)


def _cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """As `torch.nn.functional.cross_entropy`, but 0 instead of NaN where all examples are left out."""
    if y.shape != out.shape[:1] + out.shape[2:] or out.dim() < 2:
        raise ValueError(
            f"y: expected a label for each of a task's outputs {list(out.shape)}, got {list(y.shape)}"
        )
    y = checked_labels("y", y, out.shape[1])
    return F.cross_entropy(out, y, reduction="sum") / (y != IGNORED).sum().clamp_min(1)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": _mse, "cross_entropy": _cross_entropy}
