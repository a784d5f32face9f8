"""What `metafast eval` does beyond accuracy: pairs, sequences, figures, a person's own images."""

# ruff: noqa: E402 (what may be absent is looked for before the imports that need it)

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
pytest.importorskip("matplotlib", reason="figures need metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
Image = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")

from metafast.program.cli import main
from metafast.program.evaluate import error_rates

FEW = "--image-size 16 --hidden 4 --ways 3 --shots 1 --queries 2 --tasks 2"
PNG = b"\x89PNG"


def picture(place: int, seed: int) -> np.ndarray:
    """uint8 [16, 16]: a bright square at a place of its own on black, and a little noise."""
    pixels = np.random.default_rng(seed).integers(0, 20, (16, 16), dtype=np.uint8)
    row, column = divmod(place, 3)
    pixels[8 * row + 1 : 8 * row + 6, 5 * column : 5 * column + 5] = 235
    return pixels


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for place in range(6):
            folder = root / split / f"place{place}"
            folder.mkdir(parents=True)
            for seed in range(4):
                Image.fromarray(picture(place, seed)).save(folder / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A trained run of each method, made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def run(method: str, steps: int = 2) -> Path:
        out = root / f"{method}-{steps}"
        if not out.exists():
            words = f"train {method} --data {images} {FEW} --steps {steps} --lr 0.01 --out {out}"
            assert main(words.split()) == 0
        return out

    return run


def test_error_rates() -> None:
    rates = error_rates(torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.1, 0.3, 0.75, 0.0]))
    assert rates.at(0.5) == (0.25, 0.25)
    assert rates.at(0.0) == (1.0, 0.0)
    assert rates.at(0.95) == (0.0, 0.75)  # from the highest score on: 0.9 is still accepted
    threshold, error = rates.equal
    assert 0.3 < threshold <= 0.7
    assert error == 0.25


def test_pairs_are_verified(
    images: Path, runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("siamese", 60)
    few = ["--ways", "3", "--queries", "2", "--episodes", "20"]
    assert main(["eval", str(run), *few]) == 0
    right = re.search(r"half of them same: (\S+) % right; equal error rate (\S+) %", capsys.readouterr().out)
    assert float(right[1]) > 80
    same = [str(images / "test" / "place1" / f"{seed}.png") for seed in (0, 1)]
    other = str(images / "test" / "place4" / "0.png")
    for pair, said in ((same, "the same"), ([same[0], other], "different")):
        assert main(["eval", str(run), *few, "--verify", *pair]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f": {said}, p(same) = 0." in lines[0]
        assert "equal error rate" in lines[1]


def test_verification_takes_two_images(
    images: Path, runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(images / "test" / "place1" / "0.png")
    assert main(["eval", str(runs("siamese", 60)), "--verify", one]) == 1
    assert "--verify: expected two images, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("among", ["folders", "images"])
def test_an_image_is_identified_among_others(
    among: str, images: Path, runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = images / "test"
    if among == "images":
        group = tmp_path
        for place in range(6):
            Image.fromarray(picture(place, 9)).save(group / f"place{place}.png")
    wanted, run = images / "train" / "place4" / "2.png", runs("protonet", 60)
    capsys.readouterr()
    assert main(["eval", str(run), "--identify", str(wanted), "--among", str(group)]) == 0
    head, best, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith(f"among 6 classes of {group}:")
    assert "place4" in best


def test_identifying_takes_an_image_and_a_folder(
    images: Path, runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, one = str(runs("protonet", 60)), str(images / "test" / "place1" / "0.png")
    assert main(["eval", run, "--identify", one]) == 1
    assert "--identify: expected an image together with a folder (--among)" in capsys.readouterr().err
    assert main(["eval", run, "--identify", one, "--among", "absent"]) == 1
    assert "expected an image or a folder of images, got absent" in capsys.readouterr().err


def test_a_run_on_no_images_identifies_none(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"train imaginary --data gaussians --steps 1 --out {tmp_path / 'x'}".split()) == 0
    one = str(images / "test" / "place1" / "0.png")
    assert main(["eval", str(tmp_path / "x"), "--identify", one, "--among", str(images / "test")]) == 1
    assert "--data: expected a run on images" in capsys.readouterr().err


def test_sequences_are_scored_by_instance(
    runs: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(runs("mann")), "--queries", "2", "--episodes", "3"]) == 0
    said = r"sequences of 3 examples of 3 classes each, accuracy by instance in %:( \d+\.\d){3}$"
    assert re.search(said, capsys.readouterr().out.strip())


@pytest.mark.parametrize("method", ["protonet", "maml", "siamese", "mann", "imaginary", "snail"])
def test_every_method_of_images_has_a_figure(method: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "figure.png"
    few = ["--ways", "3", "--queries", "2", "--episodes", "4"]
    assert main(["eval", str(runs(method)), *few, "--figure", str(path)]) == 0
    assert path.read_bytes().startswith(PNG)


def test_waves_have_a_figure(tmp_path: Path) -> None:
    assert main(f"train maml --data sine --hidden 8 --steps 1 --out {tmp_path / 'x'}".split()) == 0
    path = tmp_path / "waves.png"
    assert main(["eval", str(tmp_path / "x"), "--episodes", "30", "--figure", str(path)]) == 0
    assert path.read_bytes().startswith(PNG)
