"""The files of Omniglot: where they come from, and how they are read.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction",
Science 350:1332-1338, 2015. Two kinds of image set are read: the official archive of PNG files
(``images_background.zip``) and its conversion to one array (``images_background.npz``).
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from .download import Remote, download
from .paths import data_root
from .pixels import read_pixels
from .reading import reading

_OFFICIAL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_VINYALS_LISTS = (
    "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals"
)

# By path under the data folder, which is also the path under METAFAST_MIRROR: address, algorithm, digest.
REMOTES = {
    "omniglot/images_background.zip": Remote(
        f"{_OFFICIAL}/images_background.zip",
        "md5",
        "68d2efa1b9178cc56df9314c21c6e718",
    ),
    "omniglot/images_evaluation.zip": Remote(
        f"{_OFFICIAL}/images_evaluation.zip",
        "md5",
        "6b91aef0f799c5bb55b94e3f2daec811",
    ),
    "omniglot/all_runs.zip": Remote(
        f"{_OFFICIAL}/one-shot-classification/all_runs.zip",
        "sha256",
        "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325",
    ),
    "omniglot/splits_vinyals/train.txt": Remote(
        f"{_VINYALS_LISTS}/train.txt",
        "sha256",
        "984522c194c30fb678ce53304a160a42faf5403ad4f9a67010f32dd3a35738e0",
    ),
    "omniglot/splits_vinyals/val.txt": Remote(
        f"{_VINYALS_LISTS}/val.txt",
        "sha256",
        "11f99e54faee3e26f53d3231c1cceac5bf7b8730e9be31cb6dab256551dc0c1a",
    ),
    "omniglot/splits_vinyals/trainval.txt": Remote(
        f"{_VINYALS_LISTS}/trainval.txt",
        "sha256",
        "5276ae50c755596d0bff7f2284e85625695549a85ee6e36b6491ad1e5d1cc26a",
    ),
    "omniglot/splits_vinyals/test.txt": Remote(
        f"{_VINYALS_LISTS}/test.txt",
        "sha256",
        "845264cc5c156180828ccf17915668b17ee21424d0170df6e7d81676aa5d1204",
    ),
}


def find_file(root: Path, path: str, may_download: bool) -> Path:
    """``root/path``, downloaded first if it is absent; its digest is checked either way.

    Raises:
        FileNotFoundError: the file is absent and ``may_download`` is false.
        ValueError: the file is not the official one.
        ConnectionError: the download failed.
    """
    target = root / path
    if target.exists():
        _check_digest(target, REMOTES[path])
        return target
    # Where a folder was passed, METAFAST_DATA does not count.
    other = "set METAFAST_DATA to" if root == data_root(None) else "pass as root (--data-root)"
    advice = f"Put the file at {target} by hand, or {other} a data folder that has it as {path}."
    if not may_download:
        raise FileNotFoundError(f"{path} is absent, and not to be downloaded. {advice}")
    remote = REMOTES[path]
    if mirror := os.environ.get("METAFAST_MIRROR"):
        if "://" not in mirror:
            raise ValueError(f"METAFAST_MIRROR: expected an address, such as https://..., got {mirror!r}")
        remote = Remote(f"{mirror.rstrip('/')}/{path}", remote.algorithm, remote.digest)
    download(remote, target, advice)
    return target


def _check_digest(path: Path, remote: Remote) -> None:
    digest = hashlib.new(remote.algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != remote.digest:
        raise ValueError(
            f"{path}: expected the official file, {remote.algorithm} {remote.digest}, got {digest}. "
            "Remove it, and it is downloaded again."
        )


def read_image_set(root: Path, part: str, may_download: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """All images of a part, and the name ``alphabet/character`` of each class.

    Args:
        root: the data folder.
        part: ``"background"`` or ``"evaluation"``.

    Returns:
        bool [characters, drawers, 105, 105], **True is paper**, and as many names.
    """
    array, zipped = root / "omniglot" / f"images_{part}.npz", f"omniglot/images_{part}.zip"
    if array.exists() and (found := _read_array(array, part, REMOTES[zipped].digest)) is not None:
        return found
    archive = find_file(root, zipped, may_download)
    images, names = _read_archive(archive)
    if os.access(array.parent, os.W_OK):  # a data folder may be read-only; it is then only slower
        _write_array(array, images, names, REMOTES[zipped].digest)
    return images, names


def _read_array(path: Path, part: str, official: str) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """An image set as one array; ``None`` for one made here of another archive than the official one."""
    with reading(path, f"the {part} images as one array", "Remove it, and it is made anew."):
        with np.load(path, allow_pickle=False) as content:
            images = content["images"]
            names = tuple(content["names"].tolist()) if "names" in content else None
            source = str(content["source"]) if "source" in content else None
        if images.dtype != bool or images.ndim != 4 or images.shape[2:] != (105, 105):
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not bool [C, M, 105, 105]")
    if names is None:  # of others, who gave a table with it
        names = _names_from_table(path.with_name("characters.csv"), part)
    elif source != official:
        return None
    if len(names) != len(images):
        raise ValueError(f"{path}: expected {len(names)} characters, as its names say, got {len(images)}")
    return images, names


def read_vinyals_split(root: Path, split: str, may_download: bool) -> tuple[str, ...]:
    """The characters ``alphabet/character`` of a Vinyals split, in the order of its list."""
    path = find_file(root, f"omniglot/splits_vinyals/{split}.txt", may_download)  # which checks its digest
    # One line per class, alphabet/character/rotNNN; every character is there with its four rotations.
    characters = (line.rpartition("/")[0] for line in path.read_text(encoding="utf-8").split())
    return tuple(dict.fromkeys(characters))


def read_run_images(root: Path, may_download: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 20 one-shot runs: training images, test images and answers.

    Returns:
        Two times bool [20, 20, 105, 105], True is paper; and int64 [20, 20], whose element [r, i] is the
        index of the training image of run r that shows the character of its test image i.
    """
    path = find_file(root, "omniglot/all_runs.zip", may_download)
    with reading(path, "the archive of the 20 runs"), zipfile.ZipFile(path) as archive:
        numbers = [f"{i:02d}" for i in range(1, 21)]
        training = [[_read_png(archive, f"run{r}/training/class{i}.png") for i in numbers] for r in numbers]
        test = [[_read_png(archive, f"run{r}/test/item{i}.png") for i in numbers] for r in numbers]
        answers = np.empty((20, 20), dtype=np.int64)
        for run, r in enumerate(numbers):
            for line in archive.read(f"run{r}/class_labels.txt").decode().splitlines():
                item, answer = (int(path.removesuffix(".png")[-2:]) for path in line.split())
                answers[run, item - 1] = answer - 1
    return np.array(training), np.array(test), answers


def _names_from_table(table: Path, part: str) -> tuple[str, ...]:
    with reading(table, "the table of the characters"), table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == part]
        rows.sort(key=lambda row: int(row["npz_index"]))
        if [int(row["npz_index"]) for row in rows] != list(range(len(rows))):
            raise ValueError(f"npz_index does not count the characters of {part} from 0")
        return tuple(f"{row['alphabet']}/{row['character']}" for row in rows)


def _read_archive(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads alphabet/characterNN/NNNN_DD.png, below any folder, DD being the drawer."""
    with reading(path, "an archive of drawings"), zipfile.ZipFile(path) as archive:
        classes: dict[str, list[str]] = {}
        drawings = [PurePosixPath(entry) for entry in archive.namelist() if entry.endswith(".png")]
        for drawing in sorted(drawings, key=lambda path: path.name):  # by NNNN, which counts all characters
            classes.setdefault("/".join(drawing.parts[-3:-1]), []).append(str(drawing))
        drawers = {len(entries) for entries in classes.values()}
        if len(drawers) != 1:
            raise ValueError(f"the characters have {sorted(drawers)} drawings, not all as many")
        images = [[_read_png(archive, entry) for entry in entries] for entries in classes.values()]
    return np.array(images), tuple(classes)


def _read_png(archive: zipfile.ZipFile, entry: str) -> np.ndarray:
    """bool [H, W], True is paper."""
    with archive.open(entry) as file:
        return read_pixels(file, grayscale=True) > 127


def _write_array(path: Path, images: np.ndarray, names: tuple[str, ...], source: str) -> None:
    """``source``: the digest of what they were read from, by which a cache of another archive is known."""
    handle, part = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, images=images, names=np.array(names), source=np.array(source))
        os.chmod(part, 0o644)  # mkstemp makes files private, but a cache may be shared
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
