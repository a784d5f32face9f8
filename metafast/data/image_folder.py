"""Classes from a folder of image files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .classes import ImageClasses
from .pixels import pillow, read_pixels
from .reading import reading
from .resize import resize_area

# Those of torchvision's ImageFolder. Pillow knows more, of which it can only write some, such as .pdf, and
# reads some, such as .eps, .h5 and .mpg, with the help of other programs alone.
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


def image_folder(
    path: str | os.PathLike[str], *, image_size: int, grayscale: bool | None = None
) -> ImageClasses:
    """One class per sub-folder of ``path``, one example per image file in it, in sorted order.

    Images are the files that end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff or .webp, in small or
    capital letters; other files are passed over, and so are files and folders whose names begin with a dot.
    Images are resized to a square by the box (area) filter, whatever their proportions, with values 0..1
    (black..white). What is transparent is composed over white.

    Args:
        image_size: side of the square images.
        grayscale: True: one channel; False: three (RGB); default: three if any image has colour.

    Returns:
        float32 [C, M, 1 or 3, image_size, image_size], M the size of the largest class, with ``counts``.

    Warns:
        UserWarning: an image is all of one colour, or two of a class are the same.

    Raises:
        NotADirectoryError: ``path`` is no folder.
        ValueError: ``image_size`` below 1, no sub-folders, one without images, or an image that is broken.
    """
    root = Path(path)
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    folders = class_folders(root)
    classes = [_read_folder(folder, image_size, grayscale) for folder in folders]
    if any(images.shape[1] == 3 for examples in classes for images in examples):  # a grey one among them, too
        classes = [[image.expand(-1, 3, -1, -1) for image in examples] for examples in classes]
    stacked = [torch.cat(examples) for examples in classes]
    for folder, examples in zip(folders, stacked, strict=True):
        _warn_of_odd(folder, examples)
    counts = torch.tensor([len(examples) for examples in stacked])
    images = torch.nn.utils.rnn.pad_sequence(stacked, batch_first=True)
    return ImageClasses(images, tuple(folder.name for folder in folders), counts)


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes, sorted.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: it holds none.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"path: expected a folder of class folders, got {root}")
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    if not folders:
        raise ValueError(f"path: expected one folder per class in {root}, found none")
    return folders


def image_files(folder: Path, *, empty: bool = False) -> list[Path]:
    """The images of a class, sorted.

    Args:
        empty: whether there may be none.

    Raises:
        NotADirectoryError: ``folder`` is none.
        ValueError: there are no images.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"path: expected an image or a folder of images, got {folder}")
    files = [entry for entry in _visible(folder) if entry.suffix.lower() in _EXTENSIONS]
    if not files and not empty:
        raise ValueError(f"path: expected images in {folder}, found none")
    return files


def has_colour(root: Path) -> bool:
    """Has any image of the classes in ``root``? Reads them up to the first that has."""
    for folder in class_folders(root):
        for file in image_files(folder):
            with reading(file, "an image", "Remove or replace it."):
                if read_pixels(file, grayscale=None).ndim == 3:
                    return True
    return False


def image_sizes(root: Path) -> set[tuple[int, int]]:
    """(width, height) of the image files of the classes in ``root``, by their headers."""
    sizes = set()
    for folder in class_folders(root):
        for file in image_files(folder):
            with reading(file, "an image", "Remove or replace it."), pillow().open(file) as image:
                sizes.add(image.size)
    return sizes


def read_image(file: Path, *, image_size: int, grayscale: bool | None = None) -> Tensor:
    """One image file as :func:`image_folder` reads it: float32 [1 or 3, image_size, image_size]."""
    with reading(file, "an image", "Remove or replace it."):
        pixels = torch.from_numpy(np.atleast_3d(read_pixels(file, grayscale=grayscale)))  # [H, W, 1 or 3]
        return resize_area(pixels.movedim(-1, 0).float() / 255, image_size, image_size)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, sorted."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_folder(folder: Path, image_size: int, grayscale: bool | None) -> list[Tensor]:
    """Each [1, 1 or 3, image_size, image_size]."""
    files = image_files(folder)
    return [read_image(file, image_size=image_size, grayscale=grayscale).unsqueeze(0) for file in files]


def _warn_of_odd(folder: Path, examples: Tensor) -> None:
    """examples [M, ch, H, W]."""
    flat = examples.flatten(1)
    constant = int((flat.amax(1) == flat.amin(1)).sum())
    if constant:
        warnings.warn(f"{folder}: {constant} of {len(flat)} images are all of one colour", stacklevel=3)
    same = len(flat) - len(flat.unique(dim=0)) - max(constant - 1, 0)
    if same > 0:
        warnings.warn(f"{folder}: {same} of {len(flat)} images are copies of others", stacklevel=3)
