"""What methods learn from, as settings: a data set, how batches are drawn of it, and the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch

from metafast.settings import Count, NotNegative, Settings, setting

from .classes import ImageClasses
from .digits import digits
from .episodes import Problem
from .gaussians import GaussianSampler
from .image_folder import class_folders, has_colour, image_files, image_folder, image_sizes
from .networks import Network, elman_rnn, relu_cnn, sigmoid_mlp
from .omniglot import omniglot
from .optimizees import Optimization, QuadraticSampler, ScaledSampler, TrainingSampler
from .resize import resize_area
from .sampler import EpisodeSampler
from .sine import SineSampler

SPLITS = ("train", "val", "test")  # of what is drawn without end
DATA_ROOT = "where the data lie, and are downloaded to (default: METAFAST_DATA, else the user's cache)"
_DIGITS_TRAIN = 90  # of the 174 to 183 drawings of each digit
_OMNIGLOT_SIDE, _OMNIGLOT_WAYS = 14, 10


class Sampler(Protocol):
    """Draws the batch of a step, which depends on the step alone."""

    def batch(self, step: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Source(Settings, ABC):
    """A data set, and the batches that are drawn of it."""

    name: ClassVar[str]
    kind: ClassVar[str]
    """What the recipes of the methods are for."""
    own: ClassVar[frozenset[str]] = frozenset()
    """Settings whose defaults no recipe changes."""
    problem: ClassVar[type] = Problem
    """What a method is told of the tasks: the type of ``batch(step).problem``."""

    tasks: Count = setting(1, "tasks per step")

    def fitted(self, given: Collection[str]) -> Source:
        """With the settings that are not ``given``, and that depend on what the data hold, found there.

        Raises:
            ValueError: the data are not what they should be.
        """
        return self

    @abstractmethod
    def sampler(self, split: str, *, seed: int, device: torch.device | str) -> Sampler:
        """Draws the batches of a split.

        Raises:
            ValueError: there is no such split, or a size does not fit the data.
        """

    def digest(self, sampler: Sampler) -> str | None:
        """Of what ``sampler`` draws from, where it may be other data tomorrow; ``None``: it may not."""
        return None

    def contents(self, split: str, sampler: Sampler) -> str | None:
        """What ``sampler`` draws from, for people, where nobody but its owner knows it."""
        return None

    def __str__(self) -> str:
        """The data set, for people."""
        return self.name

    @property
    @abstractmethod
    def task(self) -> str:
        """What a task is, for people."""


@dataclass(frozen=True, kw_only=True)
class Images(Source):
    """Episodes of classes of images."""

    kind = "images"

    ways: Count = setting(5, "classes of a task")
    shots: Count = setting(1, "support examples of a class, or of a wave")
    queries: Count = setting(5, "query examples of a class, or of a wave")
    image_size: Count = setting(28, "side of the images in pixels")
    center: bool = setting(False, "move every drawing's centre of mass to the middle of its image")

    @abstractmethod
    def read(self, split: str) -> ImageClasses:
        """The classes of a split, as they are."""

    def prepare(self, classes: ImageClasses) -> ImageClasses:
        """Classes as they are -> as the settings ask for them."""
        return classes.centered() if self.center else classes

    def classes(self, split: str) -> ImageClasses:
        """The classes of a split, as the settings ask for them."""
        return self.prepare(self.read(split))

    def folder(self, path: Path) -> Folder:
        """A folder in the place of these data, its images made as these are: bright ink on black."""
        shared = {field.name: getattr(self, field.name) for field in fields(Images)}
        return Folder(**shared, path=path, grayscale=True, ground="found")

    def sampler(self, split: str, *, seed: int, device: torch.device | str) -> EpisodeSampler:
        return EpisodeSampler(
            self.classes(split),
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            tasks=self.tasks,
            seed=seed,
            device=device,
        )

    @property
    def task(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True, kw_only=True)
class Omniglot(Images):
    """Omniglot: 1623 handwritten characters of 50 alphabets."""

    name = "omniglot"

    protocol: Literal["vinyals", "alphabets", "background"] = setting(
        "vinyals",
        "omniglot's split: as in the papers' tables, by alphabet, or all of background for the 20-run "
        "benchmark",
    )
    data_root: Path | None = setting(None, DATA_ROOT, local=True)

    def read(self, split: str) -> ImageClasses:
        return omniglot(self.data_root, protocol=self.protocol, split=split, image_size=self.image_size)

    def __str__(self) -> str:
        return f"omniglot ({self.protocol})"


@dataclass(frozen=True, kw_only=True)
class Digits(Images):
    """scikit-learn's digits: tested on new drawings of the same ten classes."""

    name = "digits"

    data_root: Path | None = setting(None, DATA_ROOT, local=True)

    def read(self, split: str) -> ImageClasses:
        return _digits_split(digits(self.data_root), split, self.image_size)


@dataclass(frozen=True, kw_only=True)
class Folder(Images):
    """A folder with train/ and test/, in which every class is a folder of images."""

    name = "a folder"
    own = frozenset({"center"})  # whether anybody's images are drawings is not known

    path: Path = setting(Path(), option=False)
    grayscale: bool | None = setting(None, "one channel (default: three if any image of train/ has colour)")
    ground: Literal["any", "black", "white", "found"] = setting(
        "any",
        "what drawings are drawn on: white is turned to black, as omniglot's; found: by the images' borders, "
        "as centering does unless told; any: left as it is",
    )

    def fitted(self, given: Collection[str]) -> Folder:
        for split in ("train", "test"):
            if not (self.path / split).is_dir():
                raise ValueError(
                    f"data: expected a folder with train/ and test/, got {self.path} without {split}/"
                )
        settings: dict[str, Any] = {}
        if self.grayscale is None:
            settings["grayscale"] = not has_colour(self.path / "train")
        folders = class_folders(self.path / "train")
        if "ways" not in given:
            settings["ways"] = min(self.ways, len(folders))
        fewest = min(len(image_files(folder)) for folder in folders)
        if not {"shots", "queries"} & set(given) and fewest >= 2:
            settings["shots"] = min(self.shots, max(1, fewest // 2))
            settings["queries"] = min(self.queries, fewest - settings["shots"])
        return replace(self, **settings)

    def read(self, split: str) -> ImageClasses:
        return image_folder(self.path / split, image_size=self.image_size, grayscale=self.grayscale)

    def prepare(self, classes: ImageClasses) -> ImageClasses:
        ground = "found" if self.center and self.ground == "any" else self.ground
        ground = self._ground(classes) if ground == "found" else ground
        return super().prepare(classes.inverted() if ground == "white" else classes)

    def folder(self, path: Path) -> Folder:
        return replace(self, path=path)

    def _ground(self, classes: ImageClasses) -> str:
        """What the borders of the images have most of."""
        images = (
            classes.images.flatten(0, 1)
            if classes.counts is None
            else torch.cat(
                [images[:count] for images, count in zip(classes.images, classes.counts, strict=True)]
            )
        )
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1)
        level = float(border.median())
        if 0.25 < level < 0.75:
            raise ValueError(
                f"ground: the images' borders are grey ({level:.2f} of white), not black or white as of "
                "drawings; say which it is, or leave out center"
            )
        return "white" if level > 0.5 else "black"

    def digest(self, sampler: EpisodeSampler) -> str:
        return sampler.classes.digest()

    def contents(self, split: str, sampler: EpisodeSampler) -> str:
        classes = sampler.classes
        most, channels, height, width = classes.images.shape[1:]
        fewest = most if classes.counts is None else int(classes.counts.min())
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        sizes = image_sizes(self.path / split)
        size = f"{width}x{height}"
        if sizes != {(width, height)}:
            (w, h), *others = sorted(sizes)
            size = f"resized from {f'{len(sizes)} sizes' if others else f'{w}x{h}'} to {size}"
        return f"{len(classes)} classes, {count} images each, {'RGB' if channels == 3 else 'grey'}, {size}"

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Gaussians(Source):
    """Classes that are normal distributions with the same scatter."""

    name = kind = "gaussians"

    ways: Count = setting(5, "classes of a task")
    shots: Count = setting(1, "support examples of a class, or of a wave")
    queries: Count = setting(5, "query examples of a class, or of a wave")

    def sampler(self, split: str, *, seed: int, device: torch.device | str) -> GaussianSampler:
        seed = _stream(self.name, split, seed)
        sizes = {"ways": self.ways, "shots": self.shots, "queries": self.queries, "tasks": self.tasks}
        return GaussianSampler(**sizes, seed=seed, device=device)

    @property
    def task(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True, kw_only=True)
class Sine(Source):
    """Regression of sine waves."""

    name = kind = "sine"

    shots: Count = setting(10, "support examples of a class, or of a wave")
    queries: Count = setting(10, "query examples of a class, or of a wave")

    def sampler(self, split: str, *, seed: int, device: torch.device | str) -> SineSampler:
        seed = _stream(self.name, split, seed)
        return SineSampler(shots=self.shots, queries=self.queries, tasks=self.tasks, seed=seed, device=device)

    @property
    def task(self) -> str:
        return f"{self.shots}-shot"


@dataclass(frozen=True, kw_only=True)
class Problems(Source):
    """Problems that a learned optimizer optimises."""

    problem = Optimization

    inner_steps: Count = setting(100, "steps of an optimisation")
    random_scaling: NotNegative = setting(
        0.0, "every coordinate in units of its own, exp(-X) to exp(X), against overfitting to the task"
    )

    @abstractmethod
    def problems(self, split: str, *, seed: int, device: torch.device | str) -> Sampler:
        """Draws the problems of a split as they are."""

    def sampler(self, split: str, *, seed: int, device: torch.device | str) -> Sampler:
        seed = _stream(self.name, split, seed)
        sampler = self.problems(split, seed=seed, device=device)
        return ScaledSampler(sampler, size=self.random_scaling, seed=seed) if self.random_scaling else sampler

    @property
    def task(self) -> str:
        return f"{self.inner_steps} inner steps"


@dataclass(frozen=True, kw_only=True)
class Quadratic(Problems):
    """Quadratics in ten dimensions."""

    name = kind = "quadratic"

    def problems(self, split: str, *, seed: int, device: torch.device | str) -> QuadraticSampler:
        return QuadraticSampler(tasks=self.tasks, steps=self.inner_steps, seed=seed, device=device)


@dataclass(frozen=True, kw_only=True)
class Trainings(Problems):
    """Trainings of a small network on the drawings of a split."""

    network: ClassVar[Network]

    batch_size: Count = setting(128, "examples that a network sees in a step")
    data_root: Path | None = setting(None, DATA_ROOT, local=True)

    def problems(self, split: str, *, seed: int, device: torch.device | str) -> TrainingSampler:
        return self._of(_digits_split(digits(self.data_root), split, 8).to(device), None, seed)

    def _of(self, classes: ImageClasses, ways: int | None, seed: int) -> TrainingSampler:
        return TrainingSampler(
            self.network,
            classes,
            ways=ways,
            batch_size=self.batch_size,
            tasks=self.tasks,
            steps=self.inner_steps,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class DigitsMLP(Trainings):
    """An MLP with a hidden layer of 20 sigmoids, on digits."""

    name = kind = "digits-mlp"
    network = sigmoid_mlp(64, [20], 10)


@dataclass(frozen=True, kw_only=True)
class DigitsCNN(Trainings):
    """Two convolutions with ReLU, on digits."""

    name = kind = "digits-cnn"
    network = relu_cnn(8, [8, 16], 10)


@dataclass(frozen=True, kw_only=True)
class DigitsRNN(Trainings):
    """An RNN that reads digits row by row."""

    name = kind = "digits-rnn"
    network = elman_rnn(8, 32, 10)


@dataclass(frozen=True, kw_only=True)
class OmniglotMLP(Trainings):
    """An MLP with a hidden layer of 20 sigmoids, on ten characters that are drawn anew for each batch."""

    name = kind = "omniglot-mlp"
    network = sigmoid_mlp(_OMNIGLOT_SIDE**2, [20], _OMNIGLOT_WAYS)

    def problems(self, split: str, *, seed: int, device: torch.device | str) -> TrainingSampler:
        classes = omniglot(self.data_root, split=split, image_size=_OMNIGLOT_SIDE).to(device)
        return self._of(classes, _OMNIGLOT_WAYS, seed)


DATA: Mapping[str, type[Source]] = {
    source.name: source for source in (Omniglot, Digits, Folder, Sine, Gaussians)
}
"""What episodes are drawn from."""

TASKS: Mapping[str, type[Source]] = {
    source.name: source for source in (Quadratic, DigitsMLP, DigitsCNN, DigitsRNN, OmniglotMLP)
}
"""What learned optimizers optimise."""


def _digits_split(classes: ImageClasses, split: str, size: int) -> ImageClasses:
    """All ten digits in both splits, but other drawings: five digits are too few to learn new ones from."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test' for digits, got {split!r}")
    images = resize_area(classes.images, size, size)
    if split == "train":
        return ImageClasses(images[:, :_DIGITS_TRAIN], classes.names)
    return ImageClasses(images[:, _DIGITS_TRAIN:], classes.names, classes.counts - _DIGITS_TRAIN)


def _stream(name: str, split: str, seed: int) -> int:
    """The seed of a split's own stream: what a test draws was not trained on, whatever the seeds."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS} for {name}, got {split!r}")
    return len(SPLITS) * seed + SPLITS.index(split)
