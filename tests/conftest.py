"""The backends that a test of an op runs on."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import background
import emulated_build
import pytest
import torch
from emulated_build import EMULATED_BACKEND, ROOT
from hypothesis import settings

from metafast._dispatch import doors

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.append(str(ROOT))  # for bench/, behind an installed metafast

settings.register_profile("metafast", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("metafast")


@pytest.hookimpl(trylast=True)  # behind the selection by -k and -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    background.order(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@functools.cache  # once
def _start_background(session: pytest.Session) -> None:
    background.start(session.items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("quiet"):
        _start_background(item.session)


def pytest_sessionfinish() -> None:
    background.stop()


def _typed(ops: Any) -> SimpleNamespace:
    """The ops of a namespace with the results that the typed entry points of metafast._C have."""

    def entry(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = getattr(ops, name).default(*args)
            return result[0] if name == "classify" else result

        return call

    names = (
        "prototypes",
        "pairwise",
        "relation_scores",
        "classify",
        "inner_sgd",
        "maml_loss",
        "maml_loss_backward",
        "sgd_update",
        "conv_inner_sgd",
        "conv_forward",
        "lstm_unroll",
        "lstm_step_",
    )
    return SimpleNamespace(**{name: entry(name) for name in names})


@pytest.fixture(params=["cpu", EMULATED_BACKEND, pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The tensors' device, while metafast runs its CPU kernels, its emulated or its real CUDA kernels."""
    if request.param == "emulated":
        ops = emulated_build.ops()
        monkeypatch.setattr(doors, "ops", ops)
        monkeypatch.setattr(doors, "typed", _typed(ops))
    return torch.device("cuda" if request.param == "cuda" else "cpu")
