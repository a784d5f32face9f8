"""Loads the compiled module, after a look at whether it fits the torch that is installed."""

from __future__ import annotations

import sys
from pathlib import Path

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


try:
    _check_torch()
    from metafast import _C  # noqa: F401  (registers torch.ops.metafast)
except ImportError as error:
    # The command line imports this before all else, and its errors are one line.
    words = sys.orig_argv[1:3]
    if words == ["-m", "metafast"] or Path("".join(words[:1])).name in ("metafast", "metafast.exe"):
        sys.exit(f"metafast: error: {error}")
    raise
