"""SGD on many convolutional networks at once, each adapting to its task, and the gradient back through it.

Shapes: T tasks, S examples of a task, [C, H, W] an image, K steps, O outputs. A network is a sequence of L
blocks, `ConvBlock`: a convolution or a linear layer, then batch norm, activation and pooling, where it has
them; the last is linear. Its parameters are a list, block by block: the weight in the layout of
`torch.nn.Conv2d` or `torch.nn.Linear`, the bias if any, and gamma and beta if batch norm has them; all shared
by the tasks or all per task ([T, ...]). Batch norm goes by the images of a task together, in training as in
evaluation: `torch.nn.BatchNorm2d` in training mode.

`task_conv2d` is one such convolution alone, for networks of other shapes, differentiable to any order.

`metafast.adapt` finds the blocks of an `nn.Module` itself, and keeps its running statistics.

All steps of all tasks run in compiled kernels, without an autograd graph, and the meta-gradient comes from
products with the Hessian, forward over reverse, a step after the other. `conv_inner_sgd` and `conv_forward`
are differentiable once, exactly; a second differentiation raises NotImplementedError, `metafast.reference`
has it. Both work in `torch.compile(fullgraph=True)`. In the transforms of `torch.func` and in forward-mode AD
the call runs the pure-PyTorch twin in `metafast.reference`: right, but slower (`metafast.trace_doors` tells).

CPU and CUDA, float32 and float64; on one device the same bits in every run, on the CPU with any number of
threads. Under autocast they run in float32, as `inner_sgd` does. On CUDA the factors of their products are
then rounded, forward and backward: in bfloat16 to bfloat16, in float16 to TF32, which has all of its mantissa
and float32's range. Maps that products alone read are then bfloat16 in memory. Sums, parameters, steps, batch
norm and losses stay float32, and so do products of maps whose channels are no multiple of 16, as those of
images. Where a window of max-pooling has several largest pixels the first in rows gets the gradient, as in
torch; a ReLU has slope 0 at 0.

Memory: the parameters of T tasks after each of the K steps where a gradient is asked for, else of one step;
and the maps of one step. On the CPU the process keeps up to 512 MiB of maps for later calls, which the
system may take back.

Errors: TypeError for a dtype, ValueError for a shape, a device, a label or an option that does not fit,
naming the argument. NaN in a task stays in its own results, and reaches gradients that all tasks share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from metafast._dispatch import doors
from metafast._dispatch.arguments import (
    blame,
    check_choice,
    check_count,
    check_instance,
    check_not_negative,
    kind_of,
    listed,
)
from metafast.ops.inner_loop import rates_listed
from metafast.reference import convolutional as reference
from metafast.reference.convolutional import ConvBlock, Size
from metafast.reference.inner_loop import LearningRate

_ACTIVATIONS = ("none", "relu", "tanh")
_POOLS = ("none", "max", "average")
# The fields that are sizes, with the least that they may be; and those that may be None, for all of the map.
_SIZES = {"kernel": 1, "stride": 1, "padding": 0, "pool_kernel": 1, "pool_stride": 1, "pool_padding": 0}
_WHOLE = ("kernel", "pool_kernel")
_PRODUCT_DTYPE = None  # autocast puts its own in the place


def conv_inner_sgd(
    network: Sequence[ConvBlock],
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    lr: LearningRate,
    steps: int,
    momentum: float = 0.0,
    first_order: bool = False,
    example_weights: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Trains each task's copy of a convolutional network with `steps` steps of full-batch SGD.

    MAML's inner loop (Finn et al. 2017, algorithm 1, line 6), as `inner_sgd` has it for an MLP.

    Args:
        network: The blocks, from the image to the outputs.
        params: Block by block, all shared ([O, C, kh, kw], [O], ...) or all per task ([T, ...]), float32 or
            float64.
        x: [T, S, C, H, W], the dtype of `params`.
        y: [T, S, O], the dtype of `params`; with cross_entropy [T, S], int64 in [0, O), or -100.
        loss: ``"mse"``, the mean over a task's examples and outputs, or ``"cross_entropy"``, the mean over
            its examples that are not labelled -100. A task without any is not adapted.
        lr: The learning rate; tensors, which have a gradient, in the dtype of `params`:

            - a number or a tensor []
            - a tensor [K, L]: one for each step and block (Antoniou et al. 2019, section 4)
            - a sequence of tensors, one for each parameter, of its shape without T: one for each element
              (Meta-SGD, Li et al. 2017, section 3)
        steps: K, from 0 on.
        momentum: As in `torch.optim.SGD`.
        first_order: Whether the backward takes the inner gradients as constants (Nichol et al. 2018).
        example_weights: [T, S], the dtype of `params`; they may have a gradient. The loss of a task becomes
            sum(w * loss of an example) / sum(w), and a task whose weights add up to 0 is not adapted. Weight
            0 takes an example out of the loss, whatever its target, as the label -100 does; that weight has
            no gradient. Batch norm sees the images of both, as in a plain loop over the weighted loss, so
            they have to be finite.

    Returns:
        The adapted parameters, in the order of `params`, each [T, ...]. Their gradients reach `params`, `lr`,
        `x`, a float `y` and `example_weights`. And what batch norm saw of each step's batch, [K, 2, T,
        channels of all blocks with batch norm]: the mean and the variance, divided by the number of pixels.
        That has no gradient.

    Raises:
        ValueError: a shape, device, option or label does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the result is differentiated twice.

    Equivalent to, without momentum::

        theta = [p.expand(T, *p.shape) for p in params]
        for _ in range(steps):
            value = sum(F.cross_entropy(conv_forward(network, theta, x)[t], y[t]) for t in range(T))
            grads = torch.autograd.grad(value, theta, create_graph=not first_order)
            theta = [p - lr * g for p, g in zip(theta, grads)]

    Example::

        block = ConvBlock(3, padding=1, norm=True, activation="relu")
        network = [block, block, ConvBlock(None)]
        params, _ = conv_inner_sgd(network, params, x, y, loss="cross_entropy", lr=0.4, steps=5)
        F.cross_entropy(conv_forward(network, params, query_x).flatten(0, 1), query_y.flatten()).backward()
    """
    check_not_negative(lr=lr, momentum=momentum)
    network, params = _checked(network), listed("params", params)
    options = {"loss": loss, "steps": steps, "momentum": momentum, "first_order": first_order}
    try:
        rates = rates_listed(lr, params, x)
        numbers, eps = _encoded(network)
        weights = () if example_weights is None else (example_weights,)
        keep = (1 + _has_graph(*rates)) * _has_graph(*params, x, y, *rates, *weights)
        args = (params, x, y, rates, example_weights, numbers, eps, *options.values(), _PRODUCT_DTYPE, keep)
        adapted, statistics, *_ = doors.call_listed(
            "conv_inner_sgd",
            args,
            lambda: reference.conv_inner_sgd(
                network, params, x, y, lr=lr, example_weights=example_weights, **options
            ),
        )
    except Exception:
        of_weights = {} if example_weights is None else {"example_weights": example_weights}
        blame(
            {"x": x, "y": y, **of_weights},
            {"params": params},
            {"steps": steps},
            {"momentum": momentum},
            {"loss": loss},
            {"first_order": first_order},
        )
        raise
    return adapted, statistics


def conv_forward(network: Sequence[ConvBlock], params: Sequence[Tensor], x: Tensor) -> Tensor:
    """The outputs of each task's convolutional network, as `conv_inner_sgd` adapts it.

    Args:
        network: The blocks.
        params: Block by block, all shared or all per task ([T, ...]), float32 or float64.
        x: [T, S, C, H, W], the dtype of `params`.

    Returns:
        [T, S, O]. Its gradients reach `params` and `x`.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the result is differentiated twice.

    Equivalent to, for one block and a linear layer, and parameters of each task::

        outputs = []
        for t in range(T):
            weight, bias, gamma, beta, head, head_bias = (p[t] for p in params)
            z = F.conv2d(x[t], weight, bias, stride, padding)
            z = F.batch_norm(z, None, None, gamma, beta, training=True)
            z = F.max_pool2d(F.relu(z), pool_kernel, pool_stride)
            outputs.append(F.linear(z.flatten(1), head, head_bias))
        torch.stack(outputs)
    """
    network, params = _checked(network), listed("params", params)
    try:
        numbers, eps = _encoded(network)
        out, _ = doors.call_listed(
            "conv_forward",
            (params, x, numbers, eps, _PRODUCT_DTYPE, _has_graph(*params, x)),
            lambda: (reference.conv_forward(network, params, x), None),
        )
    except Exception:
        blame({"x": x}, {"params": params})
        raise
    return out


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
) -> Tensor:
    """A 2-d convolution of each task's own, for the forward of adapted convolutional networks.

    torch convolves with weights of each task's own, and so does `torch.vmap` over them, as a convolution of
    as many groups (https://github.com/pytorch/pytorch/issues/73764). Here the kernels of `conv_forward` take
    all tasks at once. So they do in the derivatives, of every order: the products onto images, kernels and
    maps are each other's derivatives. A dimension of `vmap` joins the tasks, or, where the weights do not
    have it, the images of a task; every other transform of `torch.func` takes it as torch's own operations.

    Under autocast it runs in its dtype, as `torch.nn.functional.conv2d`. float16 and bfloat16 are multiplied
    as they are and added in float32, forward and backward, and rounded once (on CUDA before the bias is added
    as well).

    On CUDA torch convolves float32 in TF32 by default, and so does this: the factors are rounded to 10 bits
    of mantissa, and a result is off by some thousandths. `torch.backends.cudnn.conv.fp32_precision = "ieee"`
    (or the older `torch.backends.cudnn.allow_tf32 = False`) is float32 throughout.

    Args:
        x: [T, B, C, H, W], any float.
        weight: [T, O, C, kh, kw], the dtype of `x`.
        bias: [T, O], the dtype of `x`, or None.
        stride: Of both dimensions, or (of rows, of columns).
        padding: Zeros around the image: on every side, or (above and below, left and right).

    Returns:
        [T, B, O, H', W'], in the dtype of `x`, with H' = (H + 2 padding - kh) // stride + 1.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.

    Equivalent to::

        torch.stack([F.conv2d(x[t], weight[t], bias[t], stride, padding) for t in range(T)])
    """
    return doors.call_composed("task_conv2d", x, weight, bias, _pair(stride), _pair(padding))


def _has_graph(*tensors: Tensor) -> bool:
    """Is there to be a graph of what is computed from these?"""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _checked(network: Sequence[ConvBlock]) -> list[ConvBlock]:
    """The blocks, each of which holds what its fields may hold."""
    if isinstance(network, (str, Tensor, ConvBlock)) or not isinstance(network, Iterable):
        raise TypeError(f"network: expected a sequence of ConvBlock, got {kind_of(network)}")
    network = list(network)
    for i, block in enumerate(network):
        name = f"network[{i}]"
        check_instance(ConvBlock, **{name: block})
        for field, least in _SIZES.items():
            size = getattr(block, field)
            if not (_fits(size, least) or (size is None and field in _WHOLE)):
                _check_size(f"{name}.{field}", size, least)
        check_choice(_ACTIVATIONS, **{f"{name}.activation": block.activation})
        check_choice(_POOLS, **{f"{name}.pool": block.pool})
        kernel = (1, 1) if block.pool_kernel is None else _pair(block.pool_kernel)
        if any(2 * padding > size for padding, size in zip(_pair(block.pool_padding), kernel, strict=True)):
            raise ValueError(
                f"{name}.pool_padding: expected at most half of pool_kernel, {block.pool_kernel}, got "
                f"{block.pool_padding}"
            )
        blame(numbers={f"{name}.eps": block.eps})
        check_not_negative(**{f"{name}.eps": block.eps})
    if not network or network[-1].kernel is not None:
        got = "a convolution" if network else "no block"
        raise ValueError(f"network: expected a linear layer as its last block, got {got}")
    return network


def _fits(size: Size, least: int) -> bool:
    numbers = size if type(size) is tuple else (size, size)
    return len(numbers) == 2 and all(type(number) is int and number >= least for number in numbers)


def _check_size(name: str, size: Size, least: int) -> None:
    if isinstance(size, (tuple, list)) and len(size) != 2:
        raise ValueError(f"{name}: expected a number or a pair, got {size!r}")
    for number in _pair(size):
        check_count(least, **{name: number})


def _pair(size: Size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def _encoded(network: Sequence[ConvBlock]) -> tuple[list[int], list[float]]:
    """The network as the ops take it: see csrc/library.cpp."""
    numbers: list[int] = []
    for block in network:
        numbers += (0, 0) if block.kernel is None else _pair(block.kernel)
        numbers += (1, 1, 0, 0) if block.kernel is None else (*_pair(block.stride), *_pair(block.padding))
        numbers.append(int(block.bias))
        numbers += (int(block.norm) * (1 + int(block.affine)), _ACTIVATIONS.index(block.activation))
        numbers.append(_POOLS.index(block.pool))
        numbers += (0, 0) if block.pool_kernel is None else _pair(block.pool_kernel)
        numbers += (*_pair(block.pool_stride), *_pair(block.pool_padding), int(block.pools_first))
    return numbers, [float(block.eps) for block in network]
