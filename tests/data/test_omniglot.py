"""Omniglot: downloads and archives on a small made-up copy, protocols and measured floors on the real one."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from metafast.data import EpisodeSampler, ImageClasses, omniglot, omniglot_runs
from metafast.data import omniglot_files as files
from metafast.data.floors import pixel_floor

DRAWERS = 3
CHARACTERS = {
    "background": ["Greek/character01", "Greek/character02", "Hebrew/character01"],
    "evaluation": ["Atlantean/character01", "Keble/character01"],
}


def drawing(number: int) -> np.ndarray:
    """bool [105, 105], True is paper: a bar of ink at the top left, as long as ``number`` says."""
    paper = np.ones((105, 105), dtype=bool)
    paper[:15, : 15 * (number % 7 + 1)] = False
    return paper


def png(paper: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    image.fromarray(paper).save(content, "png")  # one bit per pixel, as the official files
    return content.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def write_archives(folder: Path) -> None:
    """The official archives in small: PNG trees, the 20 runs, and the Vinyals lists."""
    file_id = 1
    for part, characters in CHARACTERS.items():
        entries = {}
        for character in characters:
            for drawer in range(DRAWERS):
                name = f"images_{part}/{character}/{file_id:04d}_{drawer + 1:02d}.png"
                entries[name] = png(drawing(file_id + drawer))
            file_id += 1
        # Archives need not be sorted.
        write_zip(folder / f"images_{part}.zip", dict(reversed(entries.items())))

    runs = {}
    for run in range(1, 21):
        answers = []
        for item in range(1, 21):
            answer = (item + run) % 20 + 1
            runs[f"run{run:02d}/training/class{item:02d}.png"] = png(drawing(item))
            runs[f"run{run:02d}/test/item{item:02d}.png"] = png(drawing(answer))
            answers.append(
                f"run{run:02d}/test/item{item:02d}.png run{run:02d}/training/class{answer:02d}.png"
            )
        runs[f"run{run:02d}/class_labels.txt"] = "\n".join(answers).encode()
    write_zip(folder / "all_runs.zip", runs)

    (folder / "splits_vinyals").mkdir()
    splits = {
        "train": ["Keble/character01", "Greek/character02"],
        "val": ["Hebrew/character01"],
        "trainval": ["Keble/character01", "Greek/character02", "Hebrew/character01"],
        "test": ["Atlantean/character01"],
    }
    for split, characters in splits.items():
        lines = [
            f"{character}/rot{angle}" for character in characters for angle in ("000", "090", "180", "270")
        ]
        (folder / "splits_vinyals" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_arrays(folder: Path) -> None:
    """The same images as arrays, with a table that names their rows."""
    folder.mkdir()
    file_id = 1
    rows = []
    for part, characters in CHARACTERS.items():
        images = []
        for index, character in enumerate(characters):
            images.append([drawing(file_id + drawer) for drawer in range(DRAWERS)])
            rows.append([part, file_id, index, *character.split("/")])
            file_id += 1
        np.savez_compressed(folder / f"images_{part}.npz", images=np.array(images))
    with (folder / "characters.csv").open("w", newline="") as table:
        csv.writer(table).writerows(
            [["split", "file_id", "npz_index", "alphabet", "character"], *reversed(rows)]
        )


class Mirror:
    """A local server of small archives, whose digests stand in for the official ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requested: list[str] = []
        self.breaks_off = False
        mirror = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                mirror.requested.append(self.path)
                if not mirror.breaks_off:
                    return super().do_GET()
                body = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # poll, s

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    (folder / "omniglot").mkdir()
    write_archives(folder / "omniglot")
    return folder


@pytest.fixture
def mirror(archives, monkeypatch):
    for path in files.REMOTES:
        digest = hashlib.sha256((archives / path).read_bytes()).hexdigest()
        monkeypatch.setitem(files.REMOTES, path, files.Remote("http://invalid.", "sha256", digest))
    server = Mirror(archives)
    monkeypatch.setenv("METAFAST_MIRROR", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.stop()


def same(a: ImageClasses, b: ImageClasses) -> bool:
    return a.names == b.names and torch.equal(a.images, b.images)


def test_archives_are_downloaded_once_and_kept_as_arrays(mirror, tmp_path):
    first = omniglot(tmp_path, protocol="background", rotations=False)
    assert first.names == tuple(CHARACTERS["background"])
    assert mirror.requested == ["/omniglot/images_background.zip"]
    assert sorted(file.name for file in (tmp_path / "omniglot").iterdir()) == [
        "images_background.npz",
        "images_background.zip",
    ]
    (tmp_path / "omniglot" / "images_background.zip").unlink()
    assert same(first, omniglot(tmp_path, protocol="background", rotations=False, download=False))
    assert len(mirror.requested) == 1


def test_ink_is_one_and_keeps_its_place(mirror, tmp_path):
    classes = omniglot(tmp_path, protocol="background", rotations=False, image_size=7)
    assert classes.images.shape == (3, DRAWERS, 1, 7, 7)
    for character in range(3):
        for drawer in range(DRAWERS):
            expected = torch.zeros(7, 7)
            expected[0, : (1 + character + drawer) % 7 + 1] = 1
            torch.testing.assert_close(classes.images[character, drawer, 0], expected)


def test_arrays_and_archives_hold_the_same_classes(mirror, tmp_path):
    write_arrays(tmp_path / "omniglot")
    for part, split in (("background", "train"), ("alphabets", "test")):
        from_arrays = omniglot(tmp_path, protocol=part, split=split, download=False)
        assert same(from_arrays, omniglot(tmp_path / "other", protocol=part, split=split))
    assert mirror.requested == ["/omniglot/images_background.zip", "/omniglot/images_evaluation.zip"]


@pytest.mark.parametrize(
    ("protocol", "split", "characters"),
    [
        ("vinyals", "train", {"Keble/character01", "Greek/character02"}),
        ("vinyals", "val", {"Hebrew/character01"}),
        ("vinyals", "trainval", {"Keble/character01", "Greek/character02", "Hebrew/character01"}),
        ("vinyals", "test", {"Atlantean/character01"}),
        ("alphabets", "train", {"Greek/character01", "Greek/character02"}),
        ("alphabets", "val", {"Hebrew/character01"}),
        ("alphabets", "test", {"Atlantean/character01", "Keble/character01"}),
        ("background", "train", {"Greek/character01", "Greek/character02", "Hebrew/character01"}),
    ],
)
def test_protocols_pick_their_characters(mirror, tmp_path, protocol, split, characters):
    upright = omniglot(tmp_path, protocol=protocol, split=split, rotations=False)
    assert set(upright.names) == characters
    turned = omniglot(tmp_path, protocol=protocol, split=split)
    assert same(turned, upright.rotated())


def test_runs_pair_each_query_with_its_answer(mirror, tmp_path):
    runs = omniglot_runs(tmp_path, image_size=14)
    assert runs.support.shape == runs.query.shape == (20, 20, 1, 14, 14)
    assert runs.num_classes == 20
    assert runs.support_labels.tolist() == [list(range(20))] * 20
    answered = runs.support[torch.arange(20)[:, None], runs.query_labels]
    assert torch.equal(answered, runs.query)
    assert runs.query_labels[4, 0] == 6  # run 5, item 1: class 7


def test_a_wrong_digest_names_file_expected_and_got(mirror, tmp_path, monkeypatch):
    path = "omniglot/images_background.zip"
    got = files.REMOTES[path].digest
    monkeypatch.setitem(files.REMOTES, path, files.Remote("", "md5", "0123"))
    md5 = hashlib.md5((mirror.folder / path).read_bytes()).hexdigest()
    assert md5 != got
    with pytest.raises(ValueError, match=rf"images_background.zip: expected md5 0123, got {md5}"):
        omniglot(tmp_path, protocol="background")
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_a_transfer_that_breaks_off_leaves_nothing_and_can_be_repeated(mirror, tmp_path):
    mirror.breaks_off = True
    with pytest.raises(ConnectionError, match=r"images_background.zip broke off after \d+ of \d+ bytes"):
        omniglot(tmp_path, protocol="background")
    assert list((tmp_path / "omniglot").iterdir()) == []
    mirror.breaks_off = False
    assert len(omniglot(tmp_path, protocol="background", rotations=False)) == 3


@pytest.mark.parametrize("address", ["unreachable", "not there"])
def test_without_the_file_on_the_net_the_error_says_what_to_do(mirror, tmp_path, monkeypatch, address):
    if address == "unreachable":
        mirror.stop()
    else:
        monkeypatch.setenv("METAFAST_MIRROR", f"{mirror.url}/elsewhere/")
    target = tmp_path / "omniglot" / "all_runs.zip"
    said = f"could not be downloaded.*Put the file at {target}"
    with pytest.raises(ConnectionError, match=said):
        omniglot_runs(tmp_path)
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_the_advice_is_for_the_folder_that_was_asked(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_MIRROR", f"{mirror.url}/elsewhere/")
    path = "omniglot/splits_vinyals/test.txt"
    passed, configured = tmp_path / "passed", tmp_path / "configured"
    monkeypatch.setenv("METAFAST_DATA", str(configured))
    advice = r"at {}/{} by hand, or {} a data folder that has it as {}\.$"
    with pytest.raises(ConnectionError, match=advice.format(configured, path, "set METAFAST_DATA to", path)):
        omniglot(split="test")
    other = r"pass as root \(--data-root\)"
    with pytest.raises(ConnectionError, match=advice.format(passed, path, other, path)):
        omniglot(passed, split="test")


def test_without_permission_nothing_is_downloaded(mirror, tmp_path):
    said = r"splits_vinyals/train\.txt is absent, and not to be downloaded\. Put the file at"
    with pytest.raises(FileNotFoundError, match=said):
        omniglot(tmp_path, download=False)
    assert mirror.requested == []


def test_a_terminal_shows_progress(mirror, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich", reason="needs the extra 'cli'")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    omniglot(tmp_path, protocol="background")
    shown = capsys.readouterr()
    assert "images_background.zip" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("_MOST", 100, "more than 100 bytes came"), ("_TIMEOUT", -1, r"\d+ bytes came in 0 s")],
)
def test_a_download_without_end_is_given_up(mirror, tmp_path, monkeypatch, limit, value, message):
    from metafast.data import download

    monkeypatch.setattr(download, limit, value)
    monkeypatch.setattr(download, "_LEAST_RATE", 1 << 60)
    opened = download.urllib.request.urlopen
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: opened(url, timeout=30))
    with pytest.raises(ConnectionError, match=message):
        omniglot_runs(tmp_path)
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_a_mirror_that_is_no_address_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFAST_MIRROR", "my-mirror")
    with pytest.raises(ValueError, match=r"METAFAST_MIRROR: expected an address.*got 'my-mirror'"):
        omniglot_runs(tmp_path)


def test_the_root_is_the_argument_then_metafast_data_then_the_cache(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("METAFAST_DATA", str(tmp_path / "configured"))
    omniglot_runs(tmp_path / "argument")
    omniglot_runs()
    monkeypatch.delenv("METAFAST_DATA")
    omniglot_runs()
    for root in ("argument", "configured", "cache/metafast"):
        assert (tmp_path / root / "omniglot" / "all_runs.zip").exists()


def test_characters_of_a_split_that_have_no_drawings_are_reported(mirror, tmp_path, monkeypatch):
    lists = tmp_path / "omniglot" / "splits_vinyals"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("Hebrew/character01/rot000\nHebrew/character99/rot000\n")
    digest = hashlib.sha256((lists / "val.txt").read_bytes()).hexdigest()
    path = "omniglot/splits_vinyals/val.txt"
    monkeypatch.setitem(files.REMOTES, path, files.Remote("http://invalid.", "sha256", digest))
    with pytest.raises(ValueError, match="1 characters of the split are absent, first 'Hebrew/character99'"):
        omniglot(tmp_path, split="val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "vinyal"}, "protocol: expected one of .*'vinyals'.* got 'vinyal'"),
        ({"split": "valid"}, "split: expected one of .*'val'.* for 'vinyals', got 'valid'"),
        ({"protocol": "background", "split": "test"}, "split: expected one of"),
        ({"image_size": 0}, "image_size: expected 1..105"),
        ({"image_size": 106}, "image_size: expected 1..105"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        omniglot(tmp_path, download=False, **arguments)


def test_the_official_splits_have_their_known_sizes(data_folder):
    lists = data_folder / "omniglot" / "splits_vinyals"
    val = omniglot(split="val")
    assert sorted(val.names) == sorted((lists / "val.txt").read_text().split())
    assert val.images.shape == (688, 20, 1, 28, 28)
    assert len(omniglot(rotations=False)) == 1028
    held_out = omniglot(protocol="alphabets", split="val", rotations=False)
    assert {name.split("/")[0] for name in held_out.names} == {
        "Armenian",
        "Bengali",
        "Early_Aramaic",
        "Hebrew",
        "Mkhedruli_(Georgian)",
    }
    train = omniglot(protocol="alphabets", rotations=False)
    assert len(train) + len(held_out) == 964
    assert not {name.split("/")[0] for name in train.names} & {name.split("/")[0] for name in held_out.names}


def test_mean_ink_is_as_measured(data_folder):
    """7.8 % of the background is ink, 8.4 % of the evaluation set."""
    background = omniglot(protocol="background", rotations=False)
    evaluation = omniglot(protocol="alphabets", split="test", rotations=False)
    assert (len(background), len(evaluation)) == (964, 659)
    assert float(background.images.mean()) == pytest.approx(0.078, abs=0.0005)
    assert float(evaluation.images.mean()) == pytest.approx(0.084, abs=0.0005)


def test_pixel_floors_are_as_measured(data_folder):
    """Vinyals test, cosine nearest neighbour of pixels, 1-shot, 5 queries: 48.6 % (5-way), 29.7 % (20-way).

    The figures come from 600 episodes drawn and shrunk by other code: they agree only if split, orientation,
    ink, size and sampler do.
    """
    classes = omniglot(split="test")
    for ways, measured in ((5, 0.486), (20, 0.297)):
        sampler = EpisodeSampler(classes, ways=ways, shots=1, queries=5, tasks=20)
        accuracy = torch.tensor([pixel_floor(sampler.batch(step)) for step in range(30)])
        # Two samples of 600 episodes differ by less than four standard errors of their difference.
        assert abs(float(accuracy.mean()) - measured) < 4 * 2**0.5 * float(accuracy.std()) / 30**0.5


def test_the_20_runs_score_as_measured(data_folder):
    """Pixel nearest neighbour by L2 errs on 81.0 % of the 400 queries at 105x105, on 79.0 % at 28x28."""
    assert pixel_floor(omniglot_runs(image_size=105), "euclidean") == pytest.approx(0.19)
    # Another box filter, rounded to bytes, may turn a query or two.
    assert pixel_floor(omniglot_runs(), "euclidean") == pytest.approx(0.21, abs=0.0051)
