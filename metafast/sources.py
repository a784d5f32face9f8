"""The data sets that the command line offers, by name."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from metafast.data import ImageClasses, digits, image_folder, omniglot
from metafast.data.resize import resize_area

DATA_ROOT_HELP = "where the data lie, and are downloaded to (default: METAFAST_DATA, else the user's cache)"
_DIGITS_TRAIN = 90  # of the 174 to 183 drawings of each digit


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="omniglot",
        metavar="NAME",
        help="omniglot; digits (tested on new drawings of the same ten classes); or a folder with train/ and "
        "test/, in which every class is a folder of images (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        default="vinyals",
        choices=("vinyals", "alphabets", "background"),
        help="omniglot's split: as in the papers' tables, by alphabet, or all of background for the 20-run "
        "benchmark (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=28,
        metavar="PIXELS",
        help="side of the images (default: %(default)s)",
    )
    parser.add_argument("--data-root", metavar="DIR", help=DATA_ROOT_HELP)


def describe(options: Namespace) -> str:
    """The data set and its protocol, for people."""
    return f"omniglot ({options.protocol})" if options.data == "omniglot" else options.data


def load_classes(options: Namespace, split: str) -> ImageClasses:
    """The classes of a split, by the options above.

    Raises:
        ValueError: there is no such split or data set.
    """
    size = options.image_size
    if options.data == "omniglot":
        return omniglot(options.data_root, protocol=options.protocol, split=split, image_size=size)
    if options.data == "digits":
        return _digits_split(digits(options.data_root), split, size)
    if Path(options.data).is_dir():
        return image_folder(Path(options.data, split), image_size=size)
    raise ValueError(f"data: expected 'omniglot', 'digits' or a folder, got {options.data!r}")


def _digits_split(classes: ImageClasses, split: str, size: int) -> ImageClasses:
    """All ten digits in both splits, but other drawings: five digits are too few to learn new ones from."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test' for digits, got {split!r}")
    images = resize_area(classes.images, size, size)
    if split == "train":
        return ImageClasses(images[:, :_DIGITS_TRAIN], classes.names)
    return ImageClasses(images[:, _DIGITS_TRAIN:], classes.names, classes.counts - _DIGITS_TRAIN)
