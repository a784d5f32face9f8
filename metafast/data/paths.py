"""Where data sets lie on disk."""

from __future__ import annotations

import os
from pathlib import Path


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds ``omniglot/`` and ``digits/``.

    ``root`` if given, else the environment variable METAFAST_DATA, else ``metafast`` in the user's cache
    folder (XDG_CACHE_HOME, by default ``~/.cache``).
    """
    if root is not None:
        return Path(root)
    if configured := os.environ.get("METAFAST_DATA"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metafast"
