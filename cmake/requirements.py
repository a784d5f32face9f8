"""The wheel's dependencies (scikit-build-core asks): the minor release of torch it is compiled against."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version


def dynamic_metadata(field: str, settings: Mapping[str, object] | None = None) -> list[str]:
    """`dependencies` of the project: torch's C++ interface holds within a minor release only."""
    major, minor = version("torch").split(".")[:2]
    return [f"torch=={major}.{minor}.*", "numpy"]
