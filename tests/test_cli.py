"""The command line, end to end on tiny runs."""

# ruff: noqa: E402 (what may be absent is looked for before the imports that need it)

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="training needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
PIL = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")

from metafast.checkpoint import Checkpoint, find_checkpoint
from metafast.cli import main
from metafast.data import EpisodeSampler, ImageClasses

TINY = ["--image-size", "16", "--hidden", "4", "--ways", "2", "--queries", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with six classes of five images: a patch in a place of its own, and noise."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in range(6):
            folder = root / split / str(name)
            folder.mkdir(parents=True)
            for example in range(5):
                picture = 60 * torch.rand(16, 16, generator=generator)
                row, column = divmod(name, 3)
                picture[8 * row : 8 * row + 6, 5 * column : 5 * column + 5] += 180
                PIL.fromarray(picture.to(torch.uint8).numpy()).save(folder / f"{example}.png")
    return root


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    sizes = "--image-size 16 --hidden 8 --ways 4 --queries 2 --steps 8 --checkpoint-every 3 --log-every 4"
    return ["train", "protonet", "--data", str(images), "--out", str(out), *sizes.split(), *more]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "x"
    assert main(arguments(images, out)) == 0
    return out


def test_train_writes_a_log_and_checkpoints(trained: Path) -> None:
    steps = [json.loads(line)["step"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert steps == [4, 8]
    assert find_checkpoint(trained).name == "step-00000008.safetensors"


def test_eval_prints_accuracy_interval_and_floor(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--ways", "3", "--queries", "2", "--episodes", "20"]) == 0
    printed = capsys.readouterr().out
    assert "3-way 1-shot, 20 episodes" in printed
    accuracy = float(printed.split(": ")[1].split(" ±")[0])
    assert accuracy > 50  # chance is 33


def test_resume_continues_and_a_second_run_does_not_overwrite(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(images, trained)) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main(arguments(images, tmp_path / "y", "--resume")) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    find_checkpoint(tmp_path / "y").unlink()  # as if it had been killed after step 6
    assert main(arguments(images, tmp_path / "y", "--resume")) == 0
    assert "resumes after step 6" in capsys.readouterr().out
    whole, resumed = (Checkpoint.read(find_checkpoint(path)).tensors for path in (trained, tmp_path / "y"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_refuses_another_run(images: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(images, trained, "--resume", "--lr", "1")) == 1
    assert "lr: the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train protonet --data nowhere", "data: expected 'omniglot', 'digits' or a folder, got 'nowhere'"),
        ("train protonet --data {images} --image-size 8", "image size: expected at least 16"),
        ("train protonet --data {images} --ways 7", "ways: expected at most 6"),
        ("train protonet --data {images} --ways 2 --queries 9", "shots \\+ queries: expected at most 5"),
        ("train protonet --data {images} --ways 2 --queries 2 --lr -1", "[Ii]nvalid learning rate"),
        ("eval {images}", "expected a checkpoint"),
        ("eval {run} --episodes 1", "episodes: expected at least 2"),
        ("eval {run} --split val", "expected a folder of class folders"),
    ],
)
def test_errors_are_one_helpful_line(
    command: str,
    message: str,
    images: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command.format(images=images, run=trained).split()
    if words[0] == "train":
        words += ["--out", str(tmp_path / "out")]
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("metafast: error: ")
    assert printed.count("\n") == 1
    assert re.search(message, printed)


def test_a_model_that_saw_the_benchmark_is_not_scored_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ImageClasses(torch.rand(6, 5, 1, 16, 16), tuple("abcdef"))
    monkeypatch.setattr("metafast.sources.omniglot", lambda *_, **__: drawn)
    assert main(["train", "protonet", "--out", str(tmp_path), *TINY]) == 0
    assert main(["eval", str(tmp_path), "--runs"]) == 1
    assert "train with --protocol background" in capsys.readouterr().err


def test_the_benchmark_of_a_model_trained_on_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ImageClasses(torch.rand(6, 5, 1, 16, 16), tuple("abcdef"))
    runs = EpisodeSampler(drawn, ways=2, shots=1, queries=2, tasks=3).batch(0)
    monkeypatch.setattr("metafast.sources.omniglot", lambda *_, **__: drawn)
    monkeypatch.setattr("metafast.jobs.omniglot_runs", lambda *_, **__: runs)
    assert main(["train", "protonet", "--protocol", "background", "--out", str(tmp_path), *TINY]) == 0
    assert main(["eval", str(tmp_path), "--runs"]) == 0
    assert "20-run one-shot benchmark" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["train", "protonet", "--help"], ["eval", "-h"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "usage: metafast" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "CPU kernels" in capsys.readouterr().out


def test_figure_of_an_episode(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need metafast[cli]")
    from metafast.figures import draw_episode

    drawn = EpisodeSampler(
        ImageClasses(torch.rand(4, 3, 1, 16, 16), tuple("abcd")), ways=4, shots=1, queries=2, tasks=1
    ).batch(0)
    log_probs = torch.randn(1, 8, 4).log_softmax(-1)
    draw_episode(drawn, log_probs, tmp_path / "new" / "episode.png", title="An episode")
    with PIL.open(tmp_path / "new" / "episode.png") as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50
