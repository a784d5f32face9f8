"""The libraries of the emulated kernels: built once a session, from cmake/emulated.cmake."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from background import Job, run

from metafast._dispatch import batching, fakes

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "build" / "emulated"
# The environment variable that names the library of the emulated kernels, where it is not the build's.
EMULATED_LIBRARY = "METAFAST_EMULATED_LIBRARY"


def _build(target: str) -> Path:
    """Builds a target of cmake/emulated.cmake."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"the emulated kernels cannot be built: no {', '.join(missing)} on PATH")
    options = ["METAFAST_EMULATED=ON", "METAFAST_CUDA=OFF", f"Python_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(EMULATED), "-G", "Ninja", *(f"-D{o}" for o in options)]
    for command in (configure, ["cmake", "--build", str(EMULATED), "--target", target]):
        result = run(command, env={**os.environ, "PATH": path})
        if result.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return EMULATED / f"{target}.so"


def _library() -> Path:
    if EMULATED_LIBRARY in os.environ:
        return Path(os.environ[EMULATED_LIBRARY])
    return _build("metafast_emulated")


def _sanitized_library() -> Path:
    library.result()  # one build at a time in a folder
    return _build("metafast_emulated_sanitized")


# The CUDA kernels on CPU tensors, under tests/cuda_emulator; and the same with sanitizers.
library = Job(_library, minutes=1.5)
sanitized_library = Job(_sanitized_library, minutes=3)
EMULATED_BACKEND = pytest.param("emulated", marks=pytest.mark.needs(library))


@functools.cache  # once, with the rules for as long as a session lasts
def _loaded() -> tuple[Any, torch.library.Library]:
    torch.ops.load_library(str(library.result()))
    fakes.register("metafast_emulated")
    return torch.ops.metafast_emulated, batching.register("metafast_emulated")


def ops() -> Any:
    """The namespace of the emulated kernels, with all that metafast's own has from Python."""
    return _loaded()[0]
