"""Loads the compiled module, after a look at whether it fits the torch that is installed."""

from __future__ import annotations

import torch

from metafast import _built


def _check_torch() -> None:
    """torch's C++ interface is stable within a minor release, and differs between CPU and CUDA builds."""
    release = torch.__version__.split("+")[0].split(".")[:2]
    if release == _built.TORCH.split(".")[:2] and torch.version.cuda == _built.TORCH_CUDA:
        return
    raise ImportError(
        f"metafast was built against torch {_built.TORCH} (CUDA: {_built.TORCH_CUDA}), but torch "
        f"{torch.__version__} (CUDA: {torch.version.cuda}) is installed. Build it against this torch: "
        "pip install --no-build-isolation --no-deps --force-reinstall <the metafast source folder>"
    )


_check_torch()

from metafast import _C  # noqa: E402, F401  (registers torch.ops.metafast)
