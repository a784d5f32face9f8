"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from .classes import ImageClasses
from .episodes import Episodes
from .omniglot_files import read_image_set, read_run_images, read_vinyals_split
from .paths import data_root
from .resize import resize_area

# protocol -> split -> the image sets that hold its characters
_PARTS = {
    "vinyals": {
        "train": ("background", "evaluation"),
        "val": ("background",),
        "trainval": ("background", "evaluation"),
        "test": ("evaluation",),
    },
    "alphabets": {"train": ("background",), "val": ("background",), "test": ("evaluation",)},
    "background": {"train": ("background",)},
}
_VALIDATION_ALPHABETS = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
_SIDE = 105
_CHUNK = 16  # characters shrunk at a time: all at once would need 850 MB of float32 at full size


def omniglot(
    root: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "vinyals",
    split: str = "train",
    image_size: int = 28,
    rotations: bool = True,
    download: bool = True,
) -> ImageClasses:
    """The classes of one split of Omniglot: 20 drawings each, float32, ink = 1.0, paper = 0.0.

    Protocols and their splits:

    - ``"vinyals"``: ``train`` 1,028, ``val`` 172, ``trainval`` 1,200, ``test`` 423 characters, the split
      behind the tables of the papers (Vinyals et al. 2016). Its parts share alphabets.
    - ``"alphabets"``: no alphabet is shared. ``val`` is the background alphabets Armenian, Bengali,
      Early_Aramaic, Hebrew and Mkhedruli_(Georgian); ``train`` the other 25 of background; ``test`` the 20 of
      evaluation.
    - ``"background"``: ``train`` is all 30 background alphabets, all that may be trained on for the 20-run
      benchmark (see :func:`omniglot_runs`).

    Args:
        root: the folder that holds ``omniglot/``; default: METAFAST_DATA, else the user's cache folder. Read
            there: ``images_{background,evaluation}.npz``, or else the official ``.zip``, which is then kept
            as ``.npz`` beside it; and for ``"vinyals"`` the lists ``splits_vinyals/*.txt``.
        image_size: side of the square images; the originals' 105 pixels are reduced by the exact box (area)
            filter, :func:`metafast.data.resize.resize_area`.
        rotations: every character turned by 0, 90, 180 and 270 degrees makes four classes, named
            ``alphabet/character/rotNNN``. Without, the classes are named ``alphabet/character``.
        download: fetch what is absent from its official place (or from METAFAST_MIRROR, a base URL with the
            same layout as ``root``) and check its digest.

    Returns:
        images [C, 20, 1, image_size, image_size], C the number of characters, or four times that.

    Raises:
        ValueError: an unknown protocol or split, ``image_size`` outside 1..105, a wrong digest or a broken
            file.
        FileNotFoundError: a file is absent and ``download`` is false.
        ConnectionError: a file is absent and could not be downloaded.
    """
    if protocol not in _PARTS:
        raise ValueError(f"protocol: expected one of {tuple(_PARTS)}, got {protocol!r}")
    if split not in _PARTS[protocol]:
        raise ValueError(f"split: expected one of {tuple(_PARTS[protocol])} for {protocol!r}, got {split!r}")
    _check_image_size(image_size)
    folder = data_root(root)

    listed = set(read_vinyals_split(folder, split, download)) if protocol == "vinyals" else set()

    def belongs(name: str, part: str) -> bool:
        if protocol == "vinyals":
            return name in listed
        if protocol == "alphabets" and part == "background":
            return (name.split("/")[0] in _VALIDATION_ALPHABETS) == (split == "val")
        return True

    pieces: list[Tensor] = []
    kept: list[str] = []
    for part in _PARTS[protocol][split]:
        paper, names = read_image_set(folder, part, download)
        rows = [row for row, name in enumerate(names) if belongs(name, part)]
        pieces += [_ink(paper[rows[i : i + _CHUNK]], image_size) for i in range(0, len(rows), _CHUNK)]
        kept += [names[row] for row in rows]
    if missing := sorted(listed.difference(kept)):
        raise ValueError(f"{folder}: {len(missing)} characters of the split are absent, first {missing[0]!r}")
    if not pieces:
        raise ValueError(f"{folder}: expected characters of {protocol} {split}, found none")
    classes = ImageClasses(torch.cat(pieces), tuple(kept))
    return classes.rotated() if rotations else classes


def omniglot_runs(
    root: str | os.PathLike[str] | None = None, *, image_size: int = 28, download: bool = True
) -> Episodes:
    """The official 20-run one-shot benchmark: 20 episodes, 20-way 1-shot, 20 queries each.

    Each run stays within one alphabet; support and query are by two different people (Lake et al. 2015). The
    score is the mean error over the 400 queries; a fair model was trained on protocol ``"background"`` only.

    Args, errors: as :func:`omniglot`.

    Returns:
        support [20, 20, 1, image_size, image_size], query of the same shape, labels int64 [20, 20].
    """
    _check_image_size(image_size)
    training, test, answers = read_run_images(data_root(root), download)
    return Episodes(
        support=_ink(training, image_size),
        support_labels=torch.arange(20).repeat(20, 1),
        query=_ink(test, image_size),
        query_labels=torch.from_numpy(answers),
    )


def _check_image_size(image_size: int) -> None:
    if not 1 <= image_size <= _SIDE:
        raise ValueError(f"image_size: expected 1..{_SIDE}, the size of the drawings, got {image_size}")


def _ink(paper: np.ndarray, image_size: int) -> Tensor:
    """bool [C, M, 105, 105], True is paper -> float32 [C, M, 1, image_size, image_size], ink = 1."""
    return resize_area(torch.from_numpy(~paper).float(), image_size, image_size).unsqueeze(2)
