"""Downloads a file whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

_BLOCK = 1 << 16
_TIMEOUT = 30  # seconds without a byte
_MOST = 1 << 28  # bytes: the largest file is 10 MB, and what never ends fills no disk
_LEAST_RATE = 1 << 10  # bytes a second, on average, or it is given up


@dataclass(frozen=True)
class Remote:
    """A file on the net: its address, and the digest that tells whether it arrived."""

    url: str
    algorithm: str  # a name that hashlib knows
    digest: str  # hexadecimal


def download(remote: Remote, target: Path, advice: str) -> None:
    """Fetches ``remote`` to ``target``; on any failure ``target`` does not exist.

    The bytes go to a ``.part`` file in the same folder, which takes the name ``target`` once its digest is
    right, so that nobody ever sees half a file. A progress bar is drawn if stderr is a terminal and
    rich is installed.

    Args:
        advice: what to do instead, where it cannot be had: a sentence.

    Raises:
        ConnectionError: the address could not be reached, or the transfer broke off, went on for longer than
            at 1 KiB/s or beyond 256 MiB; ends with ``advice``.
        ValueError: the digest is wrong; names the file, the digest expected and the one that came.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    part = Path(name)
    digest = hashlib.new(remote.algorithm, usedforsecurity=False)
    try:
        with os.fdopen(handle, "wb") as file:
            for block in _body(remote.url, target, advice):
                file.write(block)
                digest.update(block)
        if digest.hexdigest() != remote.digest:
            raise ValueError(
                f"{remote.url}: expected {remote.algorithm} {remote.digest}, got {digest.hexdigest()}; "
                f"{target} was not written"
            )
        part.chmod(0o644)  # mkstemp makes files private, but a cache may be shared
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _body(url: str, target: Path, advice: str) -> Iterator[bytes]:
    """The bytes behind ``url``, in blocks; ConnectionError if they cannot be had, or not all of them."""
    received, started = 0, time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            for block in _with_progress(iter(lambda: response.read1(_BLOCK), b""), target.name, length):
                received += len(block)
                seconds = time.monotonic() - started
                if received > _MOST:
                    raise OSError(f"more than {_MOST} bytes came")
                if seconds > _TIMEOUT and received < _LEAST_RATE * seconds:
                    raise OSError(f"{received} bytes came in {seconds:.0f} s")
                yield block
    except (OSError, HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
        raise ConnectionError(f"{url} could not be downloaded ({error}). {advice}") from error
    if length is not None and length.isdigit() and received < int(length):
        raise ConnectionError(f"{url} broke off after {received} of {length} bytes. {advice}")


def _with_progress(blocks: Iterator[bytes], name: str, length: str | None) -> Iterator[bytes]:
    """The same blocks; on a terminal, with a progress bar on stderr if rich is there to draw it."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield from blocks
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=int(length) if length is not None and length.isdigit() else None)
        for block in blocks:
            progress.advance(bar, len(block))
            yield block
