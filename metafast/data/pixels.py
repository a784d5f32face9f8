"""Reads image files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

_COLOURS = {"RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"}


def pillow() -> ModuleType:
    """``PIL.Image``, which only image files need."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("image files are read with Pillow: pip install 'metafast[cli]'") from error
    return PIL.Image


def read_pixels(file: Path | IO[bytes], *, grayscale: bool | None) -> np.ndarray:
    """uint8 [H, W] if ``grayscale``, else [H, W, 3] (RGB); if ``None``, as the file has it.

    What is transparent is composed over white: its own colour is whatever the program that wrote it left
    there, most often black. Pictures of more pixels than Pillow takes for safe are an error.
    """
    image_module = pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("error", image_module.DecompressionBombWarning)
        with image_module.open(file) as image:
            if image.mode.startswith("I;16"):  # of which Pillow's own conversion keeps all but black as white
                pixels = ((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8)
                return np.stack([pixels] * 3, -1) if grayscale is False else pixels
            if image.mode == "P":  # a palette, of colours or greys, some of them perhaps transparent
                image = image.convert("RGBA")
            colour = image.mode in _COLOURS and not (grayscale is None and _is_grey(image))
            if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                ground = image_module.new("RGBA", image.size, "white")
                image = image_module.alpha_composite(ground, image)
            return np.array(
                image.convert("RGB" if grayscale is False or (grayscale is None and colour) else "L")
            )


def _is_grey(image: object) -> bool:
    """Is every pixel of a picture with a palette, or with colour channels, a grey?"""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    return bool((red == green).all() and (green == blue).all())
