"""Data files that are cut short or have other bits: the same data, or one line that names the file."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_omniglot import write_archives, write_arrays

from metafast.data import digits, omniglot
from metafast.data import omniglot_files as files

TRIALS = 120


def broken(whole: bytes, trial: int) -> bytes:
    """Cut short, with a few bits flipped, a stretch of zeros, or empty."""
    random = np.random.default_rng(trial)
    content = bytearray(whole)
    kind = trial % 4
    if kind == 0:
        return bytes(content[: random.integers(len(content))])
    if kind == 1:
        begin = int(random.integers(len(content)))
        content[begin : begin + 64] = bytes(len(content[begin : begin + 64]))
        return bytes(content)
    for place in random.integers(len(content), size=1 if kind == 2 else 8):
        content[place] ^= 1 << int(random.integers(8))
    return bytes(content)


def check(path: Path, read: Callable[[], object], same: Callable[[object], bool]) -> int:
    """Reads the file broken in many ways; returns how often it was refused."""
    whole, refused = path.read_bytes(), 0
    for trial in range(TRIALS):
        path.write_bytes(broken(whole, trial))
        try:
            found = read()
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            message = None
        if message is None:
            assert same(found), f"trial {trial}: read as something else"
        else:
            assert message.startswith(f"{path}: expected "), f"trial {trial}: {message}"
            assert "\n" not in message
    path.write_bytes(whole)
    return refused


def test_arrays(tmp_path: Path) -> None:
    write_arrays(tmp_path / "omniglot")
    options = {"protocol": "background", "image_size": 7, "rotations": False, "download": False}
    expected = omniglot(tmp_path, **options)

    def same(found: object) -> bool:
        return torch.equal(found.images, expected.images)

    def read() -> object:
        return omniglot(tmp_path, **options)

    assert check(tmp_path / "omniglot" / "images_background.npz", read, same) > TRIALS / 2


@pytest.mark.parametrize("name", ["images_background.zip", "all_runs.zip", "splits_vinyals/val.txt"])
def test_official_files_are_known_by_their_digest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "omniglot").mkdir()
    write_archives(tmp_path / "omniglot")
    path = tmp_path / "omniglot" / name
    remote = files.Remote("http://invalid.", "sha256", files.hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(files.REMOTES, f"omniglot/{name}", remote)
    assert files.find_file(tmp_path, f"omniglot/{name}", may_download=False) == path

    def read() -> object:
        return files.find_file(tmp_path, f"omniglot/{name}", may_download=False).read_bytes()

    whole = path.read_bytes()
    assert check(path, read, lambda found: found == whole) > TRIALS / 2


def test_digits(tmp_path: Path) -> None:
    table = tmp_path / "digits" / "digits.csv.gz"
    table.parent.mkdir()
    rows = np.random.default_rng(0).integers(0, 10, (1797, 65))
    table.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode(), mtime=0))
    expected = digits(tmp_path)

    def same(found: object) -> bool:
        return torch.equal(found.images, expected.images)

    assert check(table, lambda: digits(tmp_path), same) > TRIALS / 2


def test_a_converted_set_of_another_archive_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial archive's images, kept as an array, do not win for good."""
    (tmp_path / "omniglot").mkdir()
    write_archives(tmp_path / "omniglot")
    archive = tmp_path / "omniglot" / "images_background.zip"

    def official() -> None:
        digest = files.hashlib.sha256(archive.read_bytes()).hexdigest()
        remote = files.Remote("http://invalid.", "sha256", digest)
        monkeypatch.setitem(files.REMOTES, "omniglot/images_background.zip", remote)

    options = {"protocol": "background", "image_size": 7, "rotations": False, "download": False}
    official()
    assert len(omniglot(tmp_path, **options)) == 3
    evaluation = tmp_path / "omniglot" / "images_evaluation.zip"
    archive.write_bytes(evaluation.read_bytes())  # another, which was official when it was converted
    official()
    assert len(omniglot(tmp_path, **options)) == 2
