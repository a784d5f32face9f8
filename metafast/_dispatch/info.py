"""`metafast.info()`: what this build is, and what it runs on here."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from metafast import _C


@dataclass(frozen=True, repr=False)
class Info:
    """What `info` found. Printing it gives a table."""

    metafast: str
    torch: str  # the installed one, with its build tag
    python: str
    platform: str
    compiler: str
    cpu_isa: str  # in use
    cpu_isa_detected: str  # the best that is built and that this machine has
    cpu_isas_built: tuple[str, ...]
    threads: int
    cuda: str | None  # toolkit the CUDA kernels were built with; None: built without them
    cuda_architectures: tuple[str, ...] | None
    gpus: tuple[str, ...]  # name and compute capability
    ops: dict[str, tuple[str, ...]]  # op -> the devices it has kernels for

    def __repr__(self) -> str:
        isa = f"{self.cpu_isa} (detected {self.cpu_isa_detected}; built {', '.join(self.cpu_isas_built)})"
        cuda = "not built"
        if self.cuda_architectures is not None:
            cuda = f"{self.cuda}, architectures {', '.join(self.cuda_architectures)}"
        rows = [
            ("metafast", self.metafast),
            ("torch", self.torch),
            ("python", self.python),
            ("platform", self.platform),
            ("compiler", self.compiler),
            ("CPU kernels", isa),
            ("threads", str(self.threads)),
            ("CUDA kernels", cuda),
            ("GPUs", ", ".join(self.gpus) or "none"),
        ]
        rows += [(f"op {name}", ", ".join(devices)) for name, devices in self.ops.items()]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _gpus() -> tuple[str, ...]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name} (compute capability {properties.major}.{properties.minor})")
    return tuple(found)


def _ops() -> dict[str, tuple[str, ...]]:
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("metafast::"))
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return {
        name.removeprefix("metafast::"): tuple(
            key.lower() for key in ("CPU", "CUDA") if has_kernel(name, key)
        )
        for name in names
    }


def info() -> Info:
    """Versions, the CPU instruction set in use, the CUDA build, the GPUs seen, and what each op runs on.

    Needs no GPU. `print(metafast.info())` is the table to put into a bug report.
    """
    build = _C.build_info()
    return Info(
        metafast=build["version"],
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        compiler=build["compiler"],
        cpu_isa=_C.active_isa(),
        cpu_isa_detected=_C.detected_isa(),
        cpu_isas_built=build["isas"],
        threads=torch.get_num_threads(),
        cuda=build["cuda"],
        cuda_architectures=build["cuda_architectures"],
        gpus=_gpus(),
        ops=_ops(),
    )
