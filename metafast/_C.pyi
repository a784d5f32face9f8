"""The compiled module. Importing it registers the ops in `torch.ops.metafast`."""

from typing import TypedDict

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
