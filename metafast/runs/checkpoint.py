"""The state of a training run on disk: one safetensors file per checkpoint, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_FORMAT = "metafast-checkpoint-2"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_PARTIAL = ".partial"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    Attributes:
        step: training steps done.
        config: what the writer passed, for example the options that rebuild the method.
        tensors: ``model.<name>``, ``optimizer.<parameter>.<name>`` and ``rng.<device>``.
        optimizer: the optimizer's parameter groups and the state that is no tensor.
        scheduler: the scheduler's state, ``None`` without one.
    """

    step: int
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Raises ``ValueError`` when the file is no checkpoint of metafast, or not as it was written."""
        try:
            written = path.read_bytes()  # safetensors' own opening of files knows names in UTF-8 alone
            tensors = load(written)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: expected a whole safetensors file, got a broken one ({error})"
            ) from error
        metadata = _metadata(written)
        if _FORMAT not in metadata:
            raise ValueError(f"{path}: expected format {_FORMAT!r}, got {_format(metadata)}")
        try:
            kept = json.loads(metadata[_FORMAT])
            checksum, state = kept["sha256"], kept["state"]
            read = cls(tensors=tensors, **state)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected the state of a training, got something else") from error
        if checksum != _checksum(tensors, state):
            raise ValueError(f"{path}: its checksum does not fit: the file has changed since it was written")
        return read

    @classmethod
    def latest(cls, path: str | os.PathLike[str]) -> tuple[Path, Checkpoint]:
        """The checkpoint in a file; of a folder the last that is whole, with a warning if others are not.

        Raises:
            FileNotFoundError: there is none.
            ValueError: none of them can be read.
        """
        last = find_checkpoint(path)
        found = [last] if last == Path(path) else list_checkpoints(last.parent)
        for candidate in reversed(found[1:]):
            try:
                return candidate, cls.read(candidate)
            except ValueError as error:
                warnings.warn(f"{error}; the one before it is taken", stacklevel=2)
        return found[0], cls.read(found[0])

    def model(self, part: str = "") -> dict[str, Tensor]:
        """The ``state_dict`` of the model, or of a part of it."""
        return self._under(f"model.{part}." if part else "model.")

    def restore_model(self, model: nn.Module) -> None:
        """Raises ``ValueError`` where the weights are those of another model."""
        try:
            model.load_state_dict(self.model())
        except RuntimeError as error:  # a line for each weight that does not fit
            faults = [line.strip() for line in str(error).splitlines()[1:]]
            raise ValueError(
                f"expected the weights of this {type(model).__name__}: {' '.join(faults[:1])}"
            ) from error

    def restore(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        """Puts everything back, random number generators included: training goes on bit for bit.

        Raises:
            ValueError: it is the state of another training.
        """
        self.restore_model(model)
        try:
            self._restore_training(optimizer, scheduler)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"expected the state of the optimizer, the schedule and the random numbers: {error!r}"
            ) from error

    def _restore_training(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {int(index): dict(values) for index, values in self.optimizer["state"].items()}
        for name, tensor in self._under("optimizer.").items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:  # the file is row-major; keep the parameter's memory layout
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            elif tensor.dim() > 0:
                raise ValueError(
                    f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
                )
            state[int(index)][key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": self.optimizer["param_groups"]})
        if scheduler is not None:
            scheduler.load_state_dict(self.scheduler)
        torch.set_rng_state(self.tensors["rng.cpu"])
        if "rng.cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["rng.cuda"])

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie, as ``step-00000600.safetensors``; made when the first is written.
        every: steps between two.
        keep: how many of the latest remain.
        config: kept in every file, anything that JSON can hold.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int, keep: int = 2, config: Mapping[str, Any]
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.directory = Path(directory)
        self.every = every
        self.keep = keep
        self.config = dict(config)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> Path:
        """Writes the state after ``step`` steps, then removes the oldest up to there.

        Raises:
            OSError: it could not be written, for example to a full disk. Those before it are all there.
        """
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        packed = optimizer.state_dict()
        plain: dict[int, dict[str, Any]] = {}
        for index, values in packed["state"].items():
            plain[index] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for key in values.keys() - plain[index].keys():
                tensors[f"optimizer.{index}.{key}"] = values[key]
        state = {
            "step": step,
            "config": self.config,
            "optimizer": {"state": plain, "param_groups": packed["param_groups"]},
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        path = self.directory / f"step-{step:08d}.safetensors"
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(path, tensors, state)
        # A later one is there where it was broken and an earlier one resumed from: it must not crowd out any.
        written = [other for other in list_checkpoints(self.directory) if _step(other) <= step]
        for old in written[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is whole, with a warning if a later one is not; ``None`` if there is none.

        A broken one costs the steps since the one before: done again, they end in the same bits.

        Raises:
            ValueError: none of them can be read.
        """
        return Checkpoint.latest(self.directory)[1] if list_checkpoints(self.directory) else None


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; none when there is no such folder."""
    return sorted((path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """``path`` itself when it is a file, the latest checkpoint in it when it is a run's folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    if paths := list_checkpoints(path):
        return paths[-1]
    raise FileNotFoundError(f"{path}: expected a checkpoint, or a folder with step-*.safetensors in it")


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """A kill at any moment leaves a whole file or none: the name is given once the bytes are on disk."""
    partial = path.with_suffix(_PARTIAL)
    # The format wants each tensor row-major, in memory of its own.
    copies = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    state = json.loads(json.dumps(state))  # as it is read
    # All in one entry: safetensors writes several in any order, and equal runs are to give equal files.
    metadata = {_FORMAT: json.dumps({"sha256": _checksum(copies, state), "state": state})}
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask says: safetensors lets the owner alone read
        save_file(copies, partial, metadata)
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)  # a full disk needs its room
        raise OSError(f"{path}: cannot be written ({error})") from error
    _sync(path.parent)


def _checksum(tensors: Mapping[str, Tensor], state: Any) -> str:
    """SHA-256 of all that a checkpoint holds: the state; name, dtype, shape and bytes of each tensor."""
    total = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _metadata(written: bytes) -> dict[str, str]:
    """Of a file in the format of safetensors: the length of its header, the header, and the tensors."""
    length = int.from_bytes(written[:8], "little")
    return json.loads(written[8 : 8 + length]).get("__metadata__", {})


def _format(metadata: Mapping[str, str]) -> str:
    known = [name for name in metadata if name.startswith("metafast-checkpoint-")]
    return repr(known[0]) if known else "another"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
