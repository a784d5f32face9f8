"""Reads image files."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType


def pillow() -> ModuleType:
    """``PIL.Image``, which only image files need."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("image files are read with Pillow: pip install 'metafast[cli]'") from error
    return PIL.Image


def read_pixels(file: Path | IO[bytes], *, grayscale: bool) -> np.ndarray:
    """uint8 [H, W] if ``grayscale``, else [H, W, 3] (RGB)."""
    with pillow().open(file) as image:
        if image.mode.startswith("I;16"):  # of which Pillow's own conversion keeps all but black as white
            pixels = ((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8)
            return pixels if grayscale else np.stack([pixels] * 3, -1)
        return np.array(image.convert("L" if grayscale else "RGB"))
