"""Who is to blame for what a module raises: its input, or the path that it was taken on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from metafast.adaptation.checkpoints import NotCheckpointedError
from metafast.adaptation.examples import Examples, shapes_of
from metafast.adaptation.functions import restoring_modes
from metafast.adaptation.task import Task

Result = TypeVar("Result")


def blamed(path: str, task: Task, x: Examples, run: Callable[[], Result], plain: Callable[[], Any]) -> Result:
    """What `run` returns; or an error that says which layer failed, and on what.

    Args:
        x: One task's examples.
        plain: The same for one task without a transform. Where that runs, the path was to blame.
    """
    if torch.compiler.is_compiling():
        return run()
    try:
        return restoring_modes(run)
    except (torch.OutOfMemoryError, NotCheckpointedError):
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        failed = _without_transforms(plain) if path == "torch.func" else error
        layer = task.scratch.culprit(failed or error)
        if failed is None:
            raise ValueError(
                f"path: 'torch.func' does not take {layer or 'what follows the module'}, for {error}\n"
                "path='loop' adapts the tasks one after the other, by plain autograd"
            ) from error
        if type(failed) is not RuntimeError or layer is None:
            raise failed from None
        raise ValueError(
            f"x: expected examples that the module takes; on those of a task, {shapes_of(x)}, {layer} "
            f"raised: {failed}"
        ) from failed


def _without_transforms(plain: Callable[[], Any]) -> Exception | None:
    """What one task raises without a transform, if it raises."""
    try:
        plain()
    except Exception as failed:
        return failed
    return None
