"""Classes from a folder of image files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .classes import ImageClasses
from .pixels import read_pixels
from .resize import resize_area

# Those of torchvision's ImageFolder. Pillow knows more, of which it can only write some, such as .pdf, and
# reads some, such as .eps, .h5 and .mpg, with the help of other programs alone.
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def image_folder(path: str | os.PathLike[str], *, image_size: int, grayscale: bool = True) -> ImageClasses:
    """One class per sub-folder of ``path``, one example per image file in it, in sorted order.

    Images are the files that end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff or .webp, in small or
    capital letters; other files are passed over, and so are files and folders whose names begin with a dot.
    Images are resized to a square by the box (area) filter, whatever their proportions, with values 0..1
    (black..white).

    Args:
        image_size: side of the square images.
        grayscale: one channel; otherwise three (RGB).

    Returns:
        float32 [C, M, 1 or 3, image_size, image_size], M the size of the largest class, with ``counts``.

    Raises:
        NotADirectoryError: ``path`` is no folder.
        ValueError: ``image_size`` below 1, no sub-folders, or one without images.
    """
    root = Path(path)
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if not root.is_dir():
        raise NotADirectoryError(f"path: expected a folder of class folders, got {root}")
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    if not folders:
        raise ValueError(f"path: expected one folder per class in {root}, found none")
    classes = [_read_folder(folder, image_size, grayscale) for folder in folders]
    counts = torch.tensor([len(examples) for examples in classes])
    images = torch.nn.utils.rnn.pad_sequence(classes, batch_first=True)
    return ImageClasses(images, tuple(folder.name for folder in folders), counts)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, sorted."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_folder(folder: Path, image_size: int, grayscale: bool) -> Tensor:
    """[M, ch, image_size, image_size]"""
    files = [entry for entry in _visible(folder) if entry.suffix.lower() in _EXTENSIONS]
    if not files:
        raise ValueError(f"path: expected images in {folder}, found none")
    examples = []
    for file in files:
        pixels = torch.from_numpy(read_pixels(file, grayscale=grayscale))
        channels = pixels.unsqueeze(0) if grayscale else pixels.movedim(-1, 0)
        examples.append(resize_area(channels.float() / 255, image_size, image_size))
    return torch.stack(examples)
