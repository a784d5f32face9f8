"""Faults of files, told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(path: Path | str, expected: str, advice: str = "") -> Iterator[None]:
    """Whatever a reader raises on a broken file becomes a ``ValueError`` that names it.

    Readers of zip, zlib, NumPy, csv and Pillow raise a dozen kinds of errors on broken bytes, none of which
    names the file. A file that is absent or may not be read raises as it is: that error names it.

    Args:
        expected: what the file should be.
        advice: what to do about it, a sentence.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:
        raise _broken(path, expected, advice, error) from error


def _broken(path: Path | str, expected: str, advice: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path}: expected {expected}, got a broken one ({said}). {advice}".rstrip())
