"""The log of a run, ``log.jsonl``: a JSON object a line, each with its checksum.

==================== ====================================================================================
field                meaning
==================== ====================================================================================
step                 steps done, 1 the first
loss                 of this step's batch, what is minimised
accuracy, mse,       of this step's batch after the step, in evaluation mode: the share of queries classified
final_loss           right; the mean squared error; of a learned optimizer the objective after its last step
lr                   the learning rate of this step
episodes_per_second  tasks per second since the record before, or since training began or was resumed
seconds              of training up to here, in all parts of a run that was resumed
diverged             tasks of this step that were left out because their loss or gradient was not finite
error                which numbers were not finite: they are null, for JSON has none
crc32                of the record without this field, as it is written, in hexadecimal
==================== ====================================================================================

Two runs with the same configuration on one machine have the same records but for ``episodes_per_second``,
``seconds`` and ``crc32``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMES = ("episodes_per_second", "seconds", "crc32")
"""The fields in which two equal runs differ."""

_CHECKSUM = "crc32"
_BEGINNING = b'{"step": '


class Log:
    """The file, cut back on opening to the records up to a step; nothing without a path.

    Attributes:
        seconds: of training, up to the last record that is kept.

    Raises:
        ValueError: the file is no such log, or a record has changed since it was written. It stays as it is.
    """

    def __init__(self, path: Path | None, *, keep_until: int) -> None:
        self._file = None
        self._path = path
        self.seconds = 0.0
        if path is None:
            return
        # The run may have gone on after its checkpoint, and been killed in the middle of a line.
        kept = 0
        for line, record in _records(path) if path.exists() else ():
            if record["step"] > keep_until:
                break
            kept += len(line)
            self.seconds = record.get("seconds", self.seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.truncate(kept)

    def write(self, **record: Any) -> dict[str, Any]:
        """Adds a record, and gives it as it is written."""
        record = _finite(record)
        if self._file is not None:
            try:
                self._file.write(_line(record))
            except OSError as error:
                raise OSError(f"{self._path}: cannot be written ({error})") from error
        return record


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.

    Raises:
        ValueError: it is none, or a record has changed since it was written.
    """
    return [record for _, record in _records(path)]


def check_log(path: Path) -> None:
    """Raises ``ValueError`` where there is something at ``path`` that is no log, or a damaged one."""
    if path.exists():
        read_log(path)


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """All whole lines; the last may have been cut short by a kill or a full disk."""
    *lines, last = path.read_bytes().split(b"\n")
    records = [(line + b"\n", _record(line)) for line in lines]
    foreign = not records and not _BEGINNING.startswith(last[: len(_BEGINNING)])
    if foreign or (records and all(record is None for _, record in records)):
        raise ValueError(f"{path} was not written by metafast")
    for number, (line, record) in enumerate(records, 1):
        if record is None or line.decode() != _line(record):
            raise ValueError(f"{path}: line {number} is not as metafast wrote it: its checksum does not fit")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """``None`` of a line that is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or _CHECKSUM not in record:
        return None
    del record[_CHECKSUM]
    return record


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, allow_nan=False)
    return json.dumps({**record, _CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}, allow_nan=False) + "\n"


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for numbers that JSON does not have, and an error that says what they were."""
    odd = {
        name: value for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    if not odd:
        return dict(record)
    error = ", ".join(f"{name} is {value}" for name, value in odd.items())
    return {**record, **dict.fromkeys(odd), "error": error}
