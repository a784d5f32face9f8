"""The README and docs/ run: each Python block alone, each command, on tiny data and for a step."""

# ruff: noqa: E402 (what may be absent is looked for before the imports that need it)

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
pytest.importorskip("rich", reason="training needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
pytest.importorskip("sklearn", reason="digits need metafast[digits]")
PIL = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")

from metafast.methods import METHODS
from metafast.program.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/README.md")
}


# And what these import: the environment of `make bench` has them.
OTHER_LIBRARIES = {"learn2learn", "torchvision", "gym", "qpth", "higher", "torchopt", "optree", "graphviz"}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a document."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON = [
    pytest.param(content, id=f"{name}-{number}")
    for name, text in DOCUMENTS.items()
    for number, (language, content) in enumerate(blocks(text), 1)
    if language == "python"
]
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, text in blocks(DOCUMENTS["README.md"])
    for line in text.splitlines()
    if language == "" and re.match(r"metafast [a-z]", line)
]

# Of a command the last word on an option counts.
SMALL = {
    "images": "--steps 1 --tasks 1 --ways 2 --shots 1 --queries 2 --image-size 28",
    "hidden": "--hidden 4",
    "channels": "--channels 4",
    "sine": "--steps 1 --tasks 1",
    "l2l": "--steps 1 --tasks 1 --inner-steps 20",
    "eval": "--episodes 2 --ways 2 --queries 2",
    "eval sine": "--episodes 2",
    "eval l2l": "--episodes 2 --inner-steps 4",
    "compare": "--episodes 2 --ways 2 --queries 2",
}


def small(words: list[str]) -> list[str]:
    """The same command, for a step on digits in the place of Omniglot, or on two episodes."""
    words = [{"omniglot": "digits"}.get(word, word) for word in words]
    command, subject = words[:2]
    if command == "train":
        kind = "l2l" if subject == "l2l" else "sine" if "sine" in words else "images"
        words += SMALL[kind].split()
        settings = METHODS[subject].Settings.__dataclass_fields__
        if "backbone" in settings:
            of_adapting = "channels" in settings and "--backbone" in words and "mlp" not in words
            words += SMALL["channels" if of_adapting else "hidden"].split()
    elif command == "eval":
        words += SMALL.get(f"eval {Path(subject).name}", SMALL["eval"]).split()
    elif command == "compare":
        words += SMALL[command].split()
    return words


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for a person's own images."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)

    def draw(file: str) -> None:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((28, 28, 3), 255, dtype=torch.uint8)
        pixels[4:24, 4:24] = torch.randint(255, (20, 20, 3), generator=generator, dtype=torch.uint8)
        PIL.fromarray(pixels.numpy()).save(path)

    for kind in ("images", "drawings"):
        for split in ("train", "test"):
            for name in ("alder", "ash", "beech", "larch", "oak"):
                for example in range(1, 8):
                    draw(f"my/{kind}/{split}/{name}/{example}.jpg")
    for name in ("unknown.jpg", "one.jpg", "other.jpg"):
        draw(name)
    return root


@pytest.fixture(autouse=True)
def _own_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the images and nothing else, and random numbers that change nobody's."""
    for entry in images.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("text", PYTHON)
def test_a_python_block_runs_alone(text: str) -> None:
    for run in set(re.findall(r'"(runs/[\w-]+)"', text)):
        (train,) = (words for words in COMMANDS if words[0] == "train" and run in words)
        assert main(small(train)) == 0
    try:
        exec(compile(text, "the block", "exec"), {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        if error.name not in OTHER_LIBRARIES:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_commands_run() -> None:
    """In the order of the README: a run is trained before it is evaluated."""
    assert {words[0] for words in COMMANDS} >= {"train", "eval", "compare"}
    for words in COMMANDS:
        assert main(small(words)) == 0, " ".join(words)


def anchors(text: str) -> set[str]:
    """Those of the headings of a document."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path) if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
