"""The methods, one file each, thin over the fused operations.

To add one: write a class that satisfies :class:`Method` in a file of its own and enter it in ``METHODS``. The
command line then trains, resumes and evaluates it, with the options that the class declares.
"""

from __future__ import annotations

from .conv4 import conv4
from .method import Method
from .protonet import ProtoNet

METHODS: dict[str, type[Method]] = {"protonet": ProtoNet}

__all__ = ["METHODS", "Method", "ProtoNet", "conv4"]
