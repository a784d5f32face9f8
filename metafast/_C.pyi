"""The compiled module. Importing it registers the ops in `torch.ops.metafast`."""

from typing import TypedDict

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
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor | None, ways: Tensor | None
) -> bool:
    """Whether the tensors of an episode have the same leading dimensions."""

def get_trajectory_bytes() -> int:
    """`metafast.get_trajectory_bytes`."""

def set_trajectory_bytes(limit: int) -> None:
    """`metafast.set_trajectory_bytes`."""

def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """`torch.ops.metafast.prototypes`, typed; csrc/library.cpp states what it computes, as of the others."""

def pairwise(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str) -> Tensor:
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
) -> Tensor:
    """`torch.ops.metafast.classify`, typed: its first result."""
