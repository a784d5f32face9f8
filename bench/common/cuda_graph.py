"""A call as a CUDA graph: what it does on the GPU, without the launches from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def graphed(call: Callable[[], Result], changes: Sequence[Tensor] = ()) -> Callable[[], Result]:
    """Captures `call` once; its replays write the same result tensors again.

    `changes` are the tensors that it changes in place. The calls that come before a capture, for what is done
    only once, move them; they are put back, so that the first replay starts where the call would have.
    """
    before = [tensor.clone() for tensor in changes]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of others, such as JAX's, may call what a capture forbids to its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    for tensor, value in zip(changes, before, strict=True):
        tensor.copy_(value)

    def replay() -> Result:
        graph.replay()
        return result

    return replay
