"""The backends that a test of an op runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings

from metafast import _doors

ROOT = Path(__file__).resolve().parent.parent
EMULATED = ROOT / "build" / "emulated"
# The environment variable that names the library of the emulated kernels, where it is not the build's.
EMULATED_LIBRARY = "METAFAST_EMULATED_LIBRARY"

settings.register_profile("metafast", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("metafast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


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


def _typed(ops: Any) -> SimpleNamespace:
    """The ops of a namespace with the results that the typed entry points of metafast._C have."""

    def entry(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = getattr(ops, name).default(*args)
            return result[0] if isinstance(result, tuple) else result

        return call

    return SimpleNamespace(**{name: entry(name) for name in ("prototypes", "pairwise", "classify")})


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The tensors' device, while metafast runs its CPU kernels, its emulated or its real CUDA kernels."""
    if request.param == "emulated":
        torch.ops.load_library(str(emulated_library()))
        ops = torch.ops.metafast_emulated
        monkeypatch.setattr(_doors, "ops", ops)
        monkeypatch.setattr(_doors, "typed", _typed(ops))
    return torch.device("cuda" if request.param == "cuda" else "cpu")
