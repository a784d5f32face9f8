"""Labelled images, kept as one tensor: what episodes are drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .center import center


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """Images grouped by class.

    Attributes:
        images: float32 [C, M, ch, H, W], C classes with M examples each. Handwriting: ink = 1.0, paper = 0.0.
        names: the C class names, in the order of ``images``.
        counts: int64 [C], the number of examples that class c really has; rows of ``images[c]`` from
            ``counts[c]`` on are zero padding. ``None`` when every class has M.
    """

    images: Tensor
    names: tuple[str, ...]
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dim() != 5:
            raise ValueError(f"images: expected [C, M, ch, H, W], got shape {tuple(self.images.shape)}")
        if self.images.dtype != torch.float32:
            raise TypeError(f"images: expected float32, got {self.images.dtype}")
        classes, examples = self.images.shape[:2]
        if len(self.names) != classes:
            raise ValueError(f"names: expected {classes}, one for each class, got {len(self.names)}")
        if self.counts is None:
            return
        if self.counts.dtype != torch.int64:
            raise TypeError(f"counts: expected int64, got {self.counts.dtype}")
        if self.counts.shape != (classes,):
            raise ValueError(f"counts: expected shape ({classes},), got {tuple(self.counts.shape)}")
        if self.counts.device != self.images.device:
            raise ValueError(f"counts: expected on {self.images.device}, as images, got {self.counts.device}")
        if classes and not 0 <= int(self.counts.min()) <= int(self.counts.max()) <= examples:
            raise ValueError(f"counts: expected values in 0..{examples}, got {self.counts.tolist()}")

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any]) -> ImageClasses:
        """The examples of a torch dataset, by their targets, all of them in memory.

        Args:
            dataset: its items are pairs (image, target). An image is a tensor [ch, H, W] or [H, W], an array
                [H, W] or [H, W, ch], or a Pillow picture; integers are taken as 0..255, and become 0..1. A
                target is an int, a tensor [] or a name. ``dataset.classes``, as torchvision has it, names
                the targets.

        Raises:
            ValueError: the dataset is empty, or its images differ in shape: a transform resizes them.
            TypeError: an item is no such pair.
        """
        groups: dict[Any, list[Tensor]] = {}
        shape = None
        for index in range(len(dataset)):
            image, target = _pair(dataset[index], index)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"dataset: expected images of one shape, {list(shape)} as the first, got "
                    f"{list(image.shape)} at {index}; a transform of the dataset resizes them"
                )
            groups.setdefault(target, []).append(image)
        if not groups:
            raise ValueError("dataset: expected examples, got none")
        targets = sorted(groups)
        named = getattr(dataset, "classes", None)
        names = [str(target if named is None else named[target]) for target in targets]
        examples = [torch.stack(groups[target]) for target in targets]
        counts = torch.tensor([len(images) for images in examples])
        return cls(torch.nn.utils.rnn.pad_sequence(examples, batch_first=True), tuple(names), counts)

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> ImageClasses:
        """The same classes with every tensor on ``device``."""
        counts = None if self.counts is None else self.counts.to(device)
        return ImageClasses(self.images.to(device), self.names, counts)

    def digest(self) -> str:
        """SHA-256 of the images, how many each class has, and the names."""
        total = hashlib.sha256("\0".join(self.names).encode(errors="surrogateescape"))
        total.update(repr(None if self.counts is None else self.counts.tolist()).encode())
        total.update(self.images.contiguous().cpu().numpy())
        return total.hexdigest()

    def subset(self, indices: Sequence[int] | Tensor) -> ImageClasses:
        """The classes at ``indices`` (ints in 0..C-1), in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        names = tuple(self.names[i] for i in index.tolist())
        return ImageClasses(self.images[index], names, None if self.counts is None else self.counts[index])

    def inverted(self) -> ImageClasses:
        """The same classes with black for white: ink = 1.0 of drawings on white paper."""
        images = 1 - self.images
        if self.counts is not None:  # padding stays zero
            rows = torch.arange(images.shape[1], device=images.device)
            images *= (rows < self.counts.unsqueeze(1))[..., None, None, None]
        return ImageClasses(images, self.names, self.counts)

    def centered(self) -> ImageClasses:
        """The same classes with every image moved to its middle, by :func:`metafast.data.center.center`."""
        return ImageClasses(center(self.images), self.names, self.counts)

    def rotated(self) -> ImageClasses:
        """4C classes: every class turned counter-clockwise by 0, 90, 180 and 270 degrees is a new class.

        Class c becomes classes 4c..4c+3, named ``<name>/rot000`` to ``<name>/rot270``: the usual augmentation
        for Omniglot (Santoro et al. 2016, "Meta-Learning with Memory-Augmented Neural Networks").

        Raises:
            ValueError: the images are not square.
        """
        height, width = self.images.shape[-2:]
        if height != width:
            raise ValueError(f"images: rotation needs square images, got {height} x {width}")
        turns = [self.images.rot90(quarter, (-2, -1)) for quarter in range(4)]
        names = tuple(f"{name}/rot{90 * quarter:03d}" for name in self.names for quarter in range(4))
        counts = None if self.counts is None else self.counts.repeat_interleave(4)
        return ImageClasses(torch.stack(turns, dim=1).flatten(0, 1), names, counts)


def _pair(item: Any, index: int) -> tuple[Tensor, Any]:
    """The image of an item, float32 [ch, H, W], and its target, an int or a name."""
    try:
        image, target = item
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image))
            image = image.movedim(-1, 0) if image.dim() == 3 else image
        target = target if isinstance(target, str) else int(target)
    except (TypeError, ValueError) as error:
        raise TypeError(f"dataset: expected pairs (image, target), got at {index}: {error}") from error
    image = image.unsqueeze(0) if image.dim() == 2 else image
    if image.dim() != 3:
        raise TypeError(f"dataset: expected images [ch, H, W], got {list(image.shape)} at {index}")
    if image.dtype == torch.bool:
        return image.float(), target
    return image.float() if image.is_floating_point() else image.float() / 255, target
