"""Problems of the inner loop ops, as their tests set them, and how near the results have to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Relative to the largest element of the tensor, against the float64 reference on the same inputs. The
# gradient of a scalar is a sum over tasks of terms of both signs: its rounding is relative to the largest
# gradient of all.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    tasks: int = 3
    widths: tuple[int, ...] = (3, 7, 5, 2)
    support: int = 5
    query: int = 4
    steps: int = 3
    loss: str = "mse"
    lr: str = "scalar"  # or "step and layer", "element", "constant"
    per_task: bool = False
    activation: str = "tanh"
    momentum: float = 0.0
    first_order: bool = False
    step_weights: tuple[float, ...] | None = None
    reduction: str = "mean"


@dataclass
class Problem:
    """The tensors of a case; those that can have a gradient have one."""

    params: list[Tensor]
    lr: Tensor | list[Tensor]
    data: list[Tensor]  # support x, support y, query x, query y
    options: dict
    query_options: dict

    def leaves(self, *, query: bool) -> list[Tensor]:
        lr = self.lr if isinstance(self.lr, list) else [self.lr]
        tensors = [*self.params, *lr, *self.data[: 4 if query else 2]]
        return [tensor for tensor in tensors if tensor.requires_grad]


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """The same numbers for both dtypes: float64 ones are rounded to float32 first."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(*shape, generator=generator) * scale
        return numbers.to(device, dtype).requires_grad_()

    lead = (case.tasks,) if case.per_task else ()
    params = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        params += [leaf(*lead, outputs, inputs, scale=inputs**-0.5), leaf(*lead, outputs, scale=0.1)]
    if case.lr in ("scalar", "constant"):
        lr = torch.tensor(0.05).to(device, dtype).requires_grad_(case.lr == "scalar")
    elif case.lr == "step and layer":
        lr = leaf(case.steps, len(case.widths) - 1, scale=0.05)
    else:
        lr = [leaf(*p.shape[len(lead) :], scale=0.05) for p in params]
    data = []
    for count in (case.support, case.query):
        data.append(leaf(case.tasks, count, case.widths[0]))
        if case.loss == "mse":
            data.append(leaf(case.tasks, count, case.widths[-1]))
        else:
            labels = torch.randint(0, case.widths[-1], (case.tasks, count), generator=generator)
            labels[::2, -1] = -100
            data.append(labels.to(device))
    weights = None if case.step_weights is None else torch.tensor(case.step_weights).to(device, dtype)
    options = {
        "loss": case.loss,
        "steps": case.steps,
        "activation": case.activation,
        "momentum": case.momentum,
        "first_order": case.first_order,
    }
    return Problem(params, lr, data, options, {"step_weights": weights, "reduction": case.reduction})


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    scales = [other.abs().max().item() if other.numel() else 0.0 for other in expected]
    for one, other, own_scale in zip(actual, expected, scales, strict=True):
        assert one.dtype == dtype
        scale = max(scales) if other.dim() == 0 else own_scale
        atol = TOLERANCE[dtype] * max(scale, 1e-3)
        torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=atol)


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the outputs, each weighed by its own pattern of numbers."""
    total = sum(
        (
            out.double()
            * torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out.device)
        ).sum()
        for out in outputs
    )
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


CASES = [
    Case(widths=(1, 40, 40, 1), support=10, query=10, steps=5),
    Case(tasks=20, widths=(1, 40, 40, 1), support=10, query=10, steps=5),
    Case(tasks=20, widths=(1, 40, 40, 1), support=10, query=10, steps=5, first_order=True),
    Case(activation="relu", lr="step and layer", momentum=0.7),
    Case(tasks=37, activation="relu", lr="step and layer", momentum=0.7, reduction="none"),
    Case(lr="element", momentum=0.7, step_weights=(0.2, 0.3, 0.5)),
    Case(tasks=17, lr="element", step_weights=(0.2, 0.0, 0.8), reduction="none"),
    Case(per_task=True, lr="element", reduction="none"),
    Case(tasks=33, per_task=True, lr="step and layer", momentum=0.5),
    Case(tasks=18, loss="cross_entropy", lr="step and layer", per_task=True),
    Case(loss="cross_entropy", activation="relu", support=19, query=33, reduction="none"),
    Case(tasks=20, loss="cross_entropy", widths=(20, 33, 17, 6), momentum=0.9),
    Case(tasks=18, first_order=True, lr="element", momentum=0.3, step_weights=(1.0, 0.5, 0.25)),
    Case(first_order=True, momentum=0.3, step_weights=(1.0, 0.5, 0.25), loss="cross_entropy"),
    Case(tasks=20, first_order=True, lr="constant", momentum=0.3, step_weights=(1.0, 0.5, 0.25)),
    Case(first_order=True, lr="constant", per_task=True, reduction="none"),
    Case(tasks=17, lr="constant", activation="relu"),
    Case(tasks=16, widths=(4, 3), activation="none", loss="cross_entropy", steps=2),
    Case(widths=(2, 3, 4, 5, 6, 5, 4, 3, 2), steps=2, lr="step and layer"),
    Case(tasks=20, widths=(2, 3, 4, 5, 6, 5, 4, 3, 2), steps=2, activation="relu"),
    Case(widths=(1, 1, 1), support=1, query=1, activation="none"),
    Case(steps=0, reduction="none"),
    Case(tasks=20, steps=0),
    Case(tasks=13, widths=(3, 300, 300, 2), steps=2),  # too large for many tasks at once
    # For a GPU's blocks of 64 and of 256 threads, its global memory, and more tasks than it takes at once.
    Case(widths=(2, 24, 1), support=3, steps=2, momentum=0.5, lr="element"),
    Case(widths=(2, 60, 60, 1), support=3, steps=2, momentum=0.5, lr="step and layer"),
    Case(tasks=2, widths=(30, 150, 150, 70), support=18, steps=2, loss="cross_entropy", lr="element"),
    Case(tasks=4300, widths=(1, 2, 1), support=2, query=1, steps=1, lr="element"),
]
# The CPU has other lanes for an even number of examples, or many (csrc/inner_loop/lanes.h).
CASES += [
    replace(case, support=8 + i % 2) for i, case in enumerate(CASES) if case.support == 5 and case.tasks > 13
]
CASES.append(Case(tasks=9, support=2, query=3, per_task=True, momentum=0.5, step_weights=(0.2, 0.0, 0.8)))
# One for each layout of the CPU's lanes.
LAYOUTS = [Case(), Case(tasks=20), Case(tasks=20, support=4), Case(widths=(3, 300, 300, 2), steps=2)]
