"""The compiled module. Importing it registers the ops in `torch.ops.metafast`. Arguments go by position."""

from typing import TypedDict

import torch
from torch import Tensor

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    isas: tuple[str, ...]
    cuda: str | None
    cuda_architectures: tuple[str, ...] | None

def build_info() -> BuildInfo:
    """What this module was built from and for."""

def active_isa() -> str:
    """The instruction set the CPU kernels run with: "baseline", "avx2" or "avx512"."""

def detected_isa() -> str:
    """The best instruction set that is built and that this machine has."""

def leading_dims_agree(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: Tensor | None,
    /,
) -> bool:
    """Whether the tensors of an episode have the same leading dimensions."""

def get_trajectory_bytes() -> int:
    """`metafast.get_trajectory_bytes`."""

def set_trajectory_bytes(limit: int, /) -> None:
    """`metafast.set_trajectory_bytes`."""

def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int, /) -> Tensor:
    """`torch.ops.metafast.prototypes`, typed; csrc/library.cpp states what it computes, as of the others."""

def pairwise(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, /) -> Tensor:
    """`torch.ops.metafast.pairwise`, typed."""

def classify(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor | None,
    ways: Tensor | None,
    num_classes: int,
    method: str,
    metric: str,
    scale: float,
    reduction: int,
    /,
) -> Tensor:
    """`torch.ops.metafast.classify`, typed: its first result."""

def inner_sgd(
    params: list[Tensor],
    x: Tensor,
    y: Tensor,
    lr: list[Tensor],
    example_weights: Tensor | None,
    loss: str,
    steps: int,
    activation: str,
    momentum: float,
    first_order: bool,
    /,
) -> list[Tensor]:
    """`torch.ops.metafast.inner_sgd`, typed."""

def maml_loss(
    params: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    lr: list[Tensor],
    step_weights: Tensor | None,
    support_weights: Tensor | None,
    query_weights: Tensor | None,
    loss: str,
    steps: int,
    activation: str,
    momentum: float,
    first_order: bool,
    mean: bool,
    /,
) -> Tensor:
    """`torch.ops.metafast.maml_loss`, typed."""

def maml_loss_backward(
    grad: Tensor,
    params: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    lr: list[Tensor],
    step_weights: Tensor | None,
    support_weights: Tensor | None,
    query_weights: Tensor | None,
    loss: str,
    steps: int,
    activation: str,
    momentum: float,
    first_order: bool,
    mean: bool,
    wanted: list[bool],
    /,
) -> tuple[Tensor, list[Tensor]]:
    """`torch.ops.metafast.maml_loss_backward`, typed."""

def conv_inner_sgd(
    params: list[Tensor],
    x: Tensor,
    y: Tensor,
    lr: list[Tensor],
    example_weights: Tensor | None,
    network: list[int],
    eps: list[float],
    loss: str,
    steps: int,
    momentum: float,
    first_order: bool,
    product_dtype: torch.dtype | None,
    keep: int,
    /,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`torch.ops.metafast.conv_inner_sgd`, typed."""

def conv_forward(
    params: list[Tensor],
    x: Tensor,
    network: list[int],
    eps: list[float],
    product_dtype: torch.dtype | None,
    keep: bool,
    /,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.metafast.conv_forward`, typed."""

def sgd_update(
    params: list[Tensor],
    grads: list[Tensor],
    lr: list[Tensor],
    momentum_buffers: list[Tensor],
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    /,
) -> tuple[list[Tensor], list[Tensor]]:
    """`torch.ops.metafast.sgd_update`, typed."""

def lstm_unroll(
    grads: list[Tensor],
    params: list[Tensor],
    losses: Tensor | None,
    state: Tensor,
    weights: list[Tensor],
    head: str,
    preprocess: str,
    p: float,
    scale: float,
    unrolled: bool,
    /,
) -> tuple[list[Tensor], Tensor]:
    """`torch.ops.metafast.lstm_unroll`, typed."""

def lstm_step_(
    params: list[Tensor],
    grads: list[Tensor],
    loss: Tensor | None,
    state: Tensor,
    weights: list[Tensor],
    head: str,
    preprocess: str,
    p: float,
    scale: float,
    /,
) -> None:
    """`torch.ops.metafast.lstm_step_`, typed."""
