"""What the commands write, to whomever still reads it."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(line: str) -> None:
    """Prints a line. A reader that has gone away, as `head` does, is no reason to end what is under way."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        mute(sys.stdout)


def mute(stream: TextIO) -> None:
    """From now on nothing comes of what is written to the stream, and no error either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
