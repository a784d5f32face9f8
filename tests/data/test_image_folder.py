"""A person's own images: what is kept of them, and what is said of broken ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from metafast.data import ImageClasses, image_folder
from metafast.data.sources import Folder, Omniglot

Image = pytest.importorskip("PIL.Image", reason="image files need metafast[cli]")


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, *shape), dtype=np.uint8)


def read(folder: Path, **options: object) -> torch.Tensor:
    return image_folder(folder, image_size=8, **options).images


def test_colour_is_kept_and_grey_stays_one_channel(tmp_path: Path) -> None:
    save(tmp_path / "grey" / "a" / "0.png", noise())
    assert read(tmp_path / "grey").shape[2] == 1
    assert read(tmp_path / "grey", grayscale=False).shape[2] == 3
    save(tmp_path / "mixed" / "a" / "0.png", noise(3))
    save(tmp_path / "mixed" / "b" / "0.png", noise())
    mixed = read(tmp_path / "mixed")
    assert mixed.shape[2] == 3
    torch.testing.assert_close(mixed[0, 0], torch.from_numpy(noise(3)).movedim(-1, 0) / 255)
    torch.testing.assert_close(mixed[1, 0], (torch.from_numpy(noise()) / 255).expand(3, 8, 8))
    assert read(tmp_path / "mixed", grayscale=True).shape[2] == 1


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "L"])
def test_greys_are_one_channel_however_a_file_says_them(mode: str, tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", noise(), mode)
    torch.testing.assert_close(read(tmp_path)[0, 0, 0], torch.from_numpy(noise()) / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), np.uint8)  # black everywhere, and transparent but for a square
    ink[2:4, 2:4, 3] = 255
    save(tmp_path / "a" / "0.png", ink, mode)
    expected = torch.ones(8, 8)
    expected[2:4, 2:4] = 0
    torch.testing.assert_close(read(tmp_path)[0, 0, 0], expected)


def test_odd_images_are_a_warning_that_names_their_class(tmp_path: Path) -> None:
    for name in ("0", "1"):
        save(tmp_path / "plain" / f"{name}.png", np.full((8, 8), 7, np.uint8))
        save(tmp_path / "twins" / f"{name}.png", noise())
        save(tmp_path / "fine" / f"{name}.png", noise(seed=int(name)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path)
    assert sorted(str(warning.message).removeprefix(f"{tmp_path}/") for warning in caught) == [
        "plain: 2 of 2 images are all of one colour",
        "twins: 1 of 2 images are copies of others",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp", "ppm"])
def test_a_broken_image_is_one_line_that_names_it(suffix: str, tmp_path: Path) -> None:
    """Cut short or with other bytes: it reads as an image of the right shape, or is named."""
    path = tmp_path / "a" / f"picture.{suffix}"
    save(path, noise(3))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        broken = bytearray(whole[: random.integers(len(whole))] if trial % 2 else whole)
        for place in random.integers(len(broken), size=3) if len(broken) else []:
            broken[place] ^= 1 << random.integers(8)
        path.write_bytes(broken)
        try:
            shape = read(tmp_path, grayscale=False).shape
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            message = None
        if message is None:
            assert shape == (1, 1, 3, 8, 8)
        else:
            assert message.startswith(f"{path}: expected an image, got a broken one (")
            assert "\n" not in message
    assert refused >= 20


def test_a_picture_too_large_to_be_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32)
    save(tmp_path / "a" / "bomb.png", noise())
    with pytest.raises(ValueError, match=r"bomb.png: expected an image, got a broken one \(Image size"):
        read(tmp_path)


# --- as data of the command line ------------------------------------------------------------------------


def folder(root: Path, images: dict[str, list[np.ndarray]]) -> Folder:
    for split in ("train", "test"):
        for name, pictures in images.items():
            for index, picture in enumerate(pictures):
                save(root / split / name / f"{index}.png", picture)
    return Folder(path=root, image_size=8, ways=60, shots=5, queries=5)


def test_sizes_that_are_not_given_fit_the_folder(tmp_path: Path) -> None:
    images = {
        name: [noise(3, seed=i) for i in range(count)] for name, count in (("a", 4), ("b", 9), ("c", 7))
    }
    data = folder(tmp_path, images)
    fitted = data.fitted({})
    assert (fitted.ways, fitted.shots, fitted.queries, fitted.grayscale) == (3, 2, 2, False)
    asked = data.fitted({"ways", "shots", "queries"})
    assert (asked.ways, asked.shots, asked.queries) == (60, 5, 5)


def test_a_folder_without_test_is_named_before_training(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "0.png", noise())
    with pytest.raises(
        ValueError, match=r"data: expected a folder with train/ and test/, got .* without test/"
    ):
        Folder(path=tmp_path).fitted({})


def drawing(ink: int, ground: int) -> np.ndarray:
    pixels = np.full((8, 8), ground, np.uint8)
    pixels[1:3, 1:3] = ink
    return pixels


@pytest.mark.parametrize(("ink", "ground"), [(255, 0), (0, 255)])
def test_drawings_are_centered_whatever_they_are_drawn_on(ink: int, ground: int, tmp_path: Path) -> None:
    data = folder(tmp_path, {"a": [drawing(ink, ground)]})
    (image,) = _centered(data).images[0, :, 0]
    expected = torch.zeros(8, 8)
    expected[3:5, 3:5] = 1
    torch.testing.assert_close(image, expected)


def test_a_folder_in_the_place_of_omniglot_has_bright_ink(tmp_path: Path) -> None:
    folder(tmp_path, {"a": [drawing(0, 255)]})
    tried = Omniglot(image_size=8).folder(tmp_path).classes("test")
    torch.testing.assert_close(tried.images[0, 0, 0], torch.from_numpy(drawing(255, 0)) / 255)
    as_it_is = Folder(path=tmp_path, image_size=8).classes("test")
    torch.testing.assert_close(as_it_is.images[0, 0, 0], torch.from_numpy(drawing(0, 255)) / 255)


def test_grey_ground_is_asked_for(tmp_path: Path) -> None:
    data = folder(tmp_path, {"a": [drawing(0, 128)]})
    with pytest.raises(ValueError, match=r"ground: the images' borders are grey \(0.50 of white\)"):
        _centered(data)
    assert _centered(data, ground="white").images.shape == (1, 1, 1, 8, 8)


def _centered(data: Folder, **settings: str) -> ImageClasses:
    return Folder(path=data.path, image_size=8, center=True, **settings).classes("train")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(8, 8, 3)] * 3, "2 classes, 2 to 3 images each, RGB, 8x8"),
        ([(6, 12), (6, 12), (6, 12)], "2 classes, 2 to 3 images each, grey, resized from 12x6 to 8x8"),
        ([(6, 12), (8, 8), (9, 9)], "2 classes, 2 to 3 images each, grey, resized from 3 sizes to 8x8"),
    ],
)
def test_a_folder_says_what_it_holds(shapes: list[tuple[int, ...]], said: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("a", 3), ("b", 2)):
        for index, shape in enumerate(shapes[:count]):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            save(tmp_path / "train" / name / f"{index}.png", pixels)
    data = Folder(path=tmp_path, image_size=8, ways=2, shots=1, queries=1)
    assert data.contents("train", data.sampler("train", seed=0, device="cpu")) == said
