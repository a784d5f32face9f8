"""Reference of the convolutional family: SGD on each task's copy of a convolutional network.

The functions have the signatures of `metafast.ops.convolutional`. What they return can be differentiated to
any order, by autograd and by every transform of ``torch.func``.

A network is a list of `ConvBlock`. Its parameters are, block by block, the weight ([O, C, kh, kw], of a
linear layer [O, C H W]), the bias [O] if any, and gamma [O] and beta [O] of an affine norm, each shared by
all tasks or of each task ([T, ...]). Inputs are [T, S, C, H, W]; targets as in `inner_loop`. Under autocast
the functions run in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner_loop import LearningRate, counting, descend, float32_under_autocast, losses_of, task_linear
from .labels import checked_labels

_ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "none": lambda x: x}

Size = int | tuple[int, int]  # of both dimensions, or (of rows, of columns)


@dataclass(frozen=True)
class ConvBlock:
    """A convolution or a linear layer, and what follows it: batch norm, activation, pooling.

    The fields mean what `torch.nn` means by them. Batch norm goes by the images of the task.
    """

    kernel: Size | None  # None: a linear layer over all of the map
    stride: Size = 1
    padding: Size = 0
    bias: bool = True
    norm: bool = False
    affine: bool = True  # whether the norm has gamma and beta
    eps: float = 1e-5
    activation: str = "none"  # or "relu", "tanh"
    pool: str = "none"  # or "max", "average" (which counts the padding)
    pool_kernel: Size | None = None  # None: the whole map
    pool_stride: Size = 1
    pool_padding: Size = 0
    pools_first: bool = False  # before the activation, behind the norm

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters, in their order."""
        norm = ("gamma", "beta") if self.norm and self.affine else ()
        return "weight", *(("bias",) if self.bias else ()), *norm


def layers_of(network: Sequence[ConvBlock]) -> list[int]:
    """The numbers of the blocks that the parameters are in."""
    return [number for number, block in enumerate(network) for _ in block.parameters]


def widths_of(network: Sequence[ConvBlock], params: Sequence[Tensor]) -> list[int]:
    """The channels that each block has for its result."""
    weights = (p for p, name in zip(params, _names(network), strict=True) if name == "weight")
    return [w.shape[-2 if block.kernel is None else -4] for block, w in zip(network, weights, strict=True)]


def _names(network: Sequence[ConvBlock]) -> list[str]:
    return [name for block in network for name in block.parameters]


def _per_task(network: Sequence[ConvBlock], params: Sequence[Tensor], tasks: int) -> Iterator[Tensor]:
    for layer, name, param in zip(layers_of(network), _names(network), params, strict=True):
        shared = 1 if name != "weight" else 2 if network[layer].kernel is None else 4
        yield param.expand(tasks, *param.shape) if param.dim() == shared else param


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
) -> Tensor:
    """A convolution of each task's own: [T, B, C, H, W], [T, O, C, kh, kw], [T, O] -> [T, B, O, H', W'].

    Every output pixel is a product with the patch of x under the kernel.
    """
    (down, right), (rows, columns) = (
        (size, size) if isinstance(size, int) else size for size in (stride, padding)
    )
    padded = F.pad(x, (columns, columns, rows, rows))
    patches = padded.unfold(3, weight.shape[3], down).unfold(4, weight.shape[4], right)
    # [T, B, C, H', W', kh, kw]
    out = torch.einsum("tbchwij,tocij->tbohw", patches, weight)
    return out if bias is None else out + bias[:, None, :, None, None]


def _run(
    network: Sequence[ConvBlock], params: Sequence[Tensor], x: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The outputs [T, S, O], and the means and variances of the batch, [T, channels of all norms]."""
    values = iter(params)
    means, variances = [x.new_zeros(x.shape[0], 0)], [x.new_zeros(x.shape[0], 0)]
    for block in network:
        of = {name: next(values) for name in block.parameters}
        weight, bias = of["weight"], of.get("bias")
        if block.kernel is None:
            bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
            x = task_linear(x.flatten(2), weight, bias)[..., None, None]
        else:
            x = task_conv2d(x, weight, bias, stride=block.stride, padding=block.padding)
        if block.norm:
            x, mean, variance = _normed(x, of.get("gamma"), of.get("beta"), block.eps)
            means.append(mean)
            variances.append(variance)
        if block.pools_first:
            x = _pooled(x, block)
        x = _ACTIVATIONS[block.activation](x)
        if not block.pools_first:
            x = _pooled(x, block)
    return x.flatten(2), (torch.cat(means, 1), torch.cat(variances, 1))


def _normed(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, S, C, H, W] by its mean and variance over S, H and W; and these, [T, C]."""
    over = (1, 3, 4)
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(over, keepdim=True)
    out = centred * (variance + eps).rsqrt()
    if gamma is not None:
        out = out * gamma[:, None, :, None, None] + beta[:, None, :, None, None]
    return out, mean[:, 0, :, 0, 0], variance[:, 0, :, 0, 0]


def _pooled(x: Tensor, block: ConvBlock) -> Tensor:
    """Of each window the mean, or the largest: of equal ones the first, in rows."""
    if block.pool == "none":
        return x
    size = x.shape[3:] if block.pool_kernel is None else block.pool_kernel
    (height, width), (down, right), (rows, columns) = map(
        _pair, (size, block.pool_stride, block.pool_padding)
    )
    largest = block.pool == "max"
    padded = F.pad(x, (columns, columns, rows, rows), value=-torch.inf if largest else 0.0)
    windows = padded.unfold(3, height, down).unfold(4, width, right).flatten(-2)  # [T, S, C, H', W', pixels]
    return windows.max(-1).values if largest else windows.mean(-1)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@float32_under_autocast
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
    """Train each task's copy of a convolutional network by `steps` steps of full-batch SGD, as `inner_sgd`.

    Args:
        network: The blocks.
        params: Block by block, shared by all tasks or one of each task.
        x: Support images, [T, S, C, H, W].
        y: Support targets: [T, S, O], or labels [T, S] with cross_entropy.
        lr: A number or 0-d tensor; [K, L], a rate for each step and block; or a sequence of tensors, one for
            each parameter and of the shape of one task's parameter.
        loss, steps, momentum, first_order: As in `inner_sgd`.
        example_weights: [T, S]. The loss of a task is sum(w * loss of an example) / sum(w). Of an example of
            weight 0 the target may be anything; batch norm sees its image.

    Returns:
        The adapted parameters, each [T, ...]; and the mean and the variance (divided by the number of pixels)
        of the batch in each step, [K, 2, T, channels of all blocks with norm], without a gradient.
    """
    if loss == "cross_entropy":
        y = checked_labels("y", counting(y, example_weights), widths_of(network, params)[-1])
    statistics = []

    def of_tasks(theta: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, moments = _run(network, theta, x)
        return losses_of(out, y, loss, example_weights).sum(), moments

    def gradient(theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grads, moments = torch.func.grad(of_tasks, has_aux=True)(theta)
        statistics.append(torch.stack(moments).detach())
        return grads

    theta = _per_task(network, params, x.shape[0])
    thetas = descend(theta, gradient, layers_of(network), lr, steps, momentum, first_order)
    normed = sum(
        width for block, width in zip(network, widths_of(network, params), strict=True) if block.norm
    )
    nothing = x.new_zeros(0, 2, x.shape[0], normed)
    return list(thetas[-1]), torch.stack(statistics) if statistics else nothing


@float32_under_autocast
def conv_forward(network: Sequence[ConvBlock], params: Sequence[Tensor], x: Tensor) -> Tensor:
    """The outputs of each task's network: images [T, S, C, H, W] -> [T, S, O]; parameters as above."""
    return _run(network, list(_per_task(network, params, x.shape[0])), x)[0]
