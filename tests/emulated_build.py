"""The library of the emulated kernels: built once a session, from cmake/emulated.cmake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "build" / "emulated"
# The environment variable that names the library of the emulated kernels, where it is not the build's.
EMULATED_LIBRARY = "METAFAST_EMULATED_LIBRARY"


@cache
def _build_emulated() -> str:
    """Builds what cmake/emulated.cmake describes; returns what the compiler said where it could not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"the emulated kernels cannot be built: no {', '.join(missing)} on PATH")
    options = ["METAFAST_EMULATED=ON", "METAFAST_CUDA=OFF", f"Python_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(EMULATED), "-G", "Ninja", *(f"-D{o}" for o in options)]
    for command in (configure, ["cmake", "--build", str(EMULATED)]):
        result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        if result.returncode != 0:
            return f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return ""


def emulated_library(name: str = "metafast_emulated") -> Path:
    """A library of cmake/emulated.cmake: the CUDA kernels on CPU tensors, under tests/cuda_emulator."""
    if EMULATED_LIBRARY in os.environ:
        return Path(os.environ[EMULATED_LIBRARY])
    error = _build_emulated()
    if error:
        pytest.fail(error, pytrace=False)
    return EMULATED / f"{name}.so"
