"""Dataclasses over tensors are equal to themselves alone: comparing tensors gives no truth value."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

import metafast

pytest.importorskip("pydantic")  # of the command line


def test_those_over_tensors_have_identity() -> None:
    found = {}
    for info in pkgutil.walk_packages(metafast.__path__, "metafast."):
        if info.name.rpartition(".")[2] in ("__main__", "_C"):
            continue
        for name, kind in inspect.getmembers(importlib.import_module(info.name), dataclasses.is_dataclass):
            own = inspect.isclass(kind) and kind.__module__.startswith("metafast")
            if own and any(
                re.search(r"Tensor|States", str(field.type)) for field in dataclasses.fields(kind)
            ):
                found[name] = kind
    assert {"Adapted", "Episodes", "Quadratics", "ImageClasses", "Checkpoint"} <= set(found)
    assert [name for name, kind in found.items() if kind.__eq__ is not object.__eq__] == []
    assert [name for name, kind in found.items() if kind.__hash__ is not object.__hash__] == []
