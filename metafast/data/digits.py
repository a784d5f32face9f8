"""Handwritten digits, 8x8: real data that comes with a package."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from .classes import ImageClasses
from .paths import data_root
from .reading import reading

_EXAMPLES = 1797


def digits(root: str | os.PathLike[str] | None = None) -> ImageClasses:
    """The ten digits, 174 to 183 examples each: float32 [10, 183, 1, 8, 8], ink = 1.0, with ``counts``.

    The test part of "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak, UCI repository, 1998),
    read from ``digits/digits.csv.gz`` in ``root`` (default: METAFAST_DATA, else the user's cache folder) if
    it is there, else out of scikit-learn's package. Both hold the same 1,797 images.

    Raises:
        ImportError: there is no file, and scikit-learn is not installed.
        ValueError: the file is broken.
    """
    table = data_root(root) / "digits" / "digits.csv.gz"
    if table.exists():
        with reading(table, "the table of the digits", "Remove it, and they come out of scikit-learn."):
            rows = np.loadtxt(table, delimiter=",", dtype=np.int64, ndmin=2)
            _check(rows)
        pixels, labels = rows[:, :64], rows[:, 64]
    else:
        pixels, labels = _from_scikit_learn(str(table))
    images = torch.from_numpy(pixels).to(torch.float32).view(-1, 1, 8, 8) / 16
    return _group(images, torch.from_numpy(labels).to(torch.int64))


def _check(rows: np.ndarray) -> None:
    if rows.shape != (_EXAMPLES, 65):
        raise ValueError(f"its size is {list(rows.shape)}, not [{_EXAMPLES}, 65]")
    if rows.min() < 0 or rows[:, :64].max() > 16 or rows[:, 64].max() > 9:
        raise ValueError("its numbers are not 64 pixels in 0..16 and a digit")


def _from_scikit_learn(absent: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"digits: there is no {absent}, so they come out of scikit-learn: pip install 'metafast[digits]'"
        ) from error
    return load_digits(return_X_y=True)


def _group(images: Tensor, labels: Tensor) -> ImageClasses:
    """[B, ...] images with labels [B] in 0..9 -> classes in label order, padded with zeros."""
    counts = torch.bincount(labels, minlength=10)
    grouped = images.new_zeros(10, int(counts.max()), *images.shape[1:])
    for digit in range(10):
        grouped[digit, : counts[digit]] = images[labels == digit]
    return ImageClasses(grouped, tuple(str(digit) for digit in range(10)), counts)
