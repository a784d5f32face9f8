"""Runs among people and programs: signals, locks, damage, readers that go away, odd names and numbers."""

# ruff: noqa: E402 (what may be absent is looked for before the imports that need it)

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
pytest.importorskip("rich", reason="training needs metafast[cli]")
safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints need metafast[cli]")
PIL = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")

import metafast
from metafast.program.cli import main
from metafast.program.signals import heard
from metafast.runs.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from metafast.runs.lock import locked
from metafast.runs.log import TIMES, read_log

WAVES = "--data sine --hidden 4 --tasks 2 --steps 6 --checkpoint-every 2 --log-every 2"

Said = Callable[..., str]


def train(out: Path, *more: str, method: str = "maml", options: str = WAVES) -> int:
    return main(["train", method, "--out", str(out), *options.split(), *more])


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command that must fail, and gives the one line that it says beside warnings."""

    def run(*words: str) -> str:
        capsys.readouterr()
        try:
            status = main([*words])
        except SystemExit as exit:  # of argparse
            status = exit.code
        assert status in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("metafast: error: ")
        return line

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "waves"
    assert train(out) == 0
    return out


def copied(run: Path, to: Path) -> Path:
    to.mkdir()
    for path in run.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def images(root: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in "abc":
            folder = root / split / name
            folder.mkdir(parents=True)
            for example in range(4):
                picture = torch.randint(0, 255, (16, 16), generator=generator, dtype=torch.uint8)
                PIL.fromarray(picture.numpy()).save(folder / f"{example}.png")
    return root


IMAGES = "--image-size 16 --hidden 8 --ways 2 --queries 1 --tasks 2 --steps 2"


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(
    number: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        while not list_checkpoints(tmp_path):
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    endless = WAVES.replace("--steps 6", "--steps 1000000")
    assert train(tmp_path, options=endless) == status
    said = re.search(r"stopped after step (\d+) of 1000000, which is saved", capsys.readouterr().err)
    assert Checkpoint.read(find_checkpoint(tmp_path)).step == int(said[1])
    assert f"train maml --out {tmp_path} --resume` goes on" in said.string
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_ends_at_once() -> None:
    with heard() as first:
        assert first() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert first() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heard() as first:
            os.kill(os.getpid(), signal.SIGINT)
            assert first() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_reader_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "metafast", "train", "maml", "--out", str(tmp_path), *WAVES.split()]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert Checkpoint.read(find_checkpoint(tmp_path)).step == 6


# --- folders ------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_by_name(run: Path, failing: Said) -> None:
    with locked(run):
        said = failing("train", "maml", "--out", str(run), "--resume")
    assert re.search(rf"{run}: process {os.getpid()} on \S+, since 20\d\d-.* is training in it", said)
    assert train(run, "--resume", options="") == 0


def test_a_killed_trainer_leaves_no_lock(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.001)
    with pytest.raises(ValueError, match=f"process {child} on .* is training in it"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert train(tmp_path / "x") == 0
    finally:
        os.umask(before)
    for name in ("config.json", "log.jsonl", "curves.png", "step-00000006.safetensors"):
        assert stat.S_IMODE((tmp_path / "x" / name).stat().st_mode) == mode


def test_equal_runs_give_equal_files(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(other) == 0
    names = sorted(path.name for path in run.iterdir() if not path.name.startswith("."))
    assert names == sorted(path.name for path in other.iterdir() if not path.name.startswith("."))
    assert names == [
        "config.json",
        "curves.png",
        "log.jsonl",
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    for name in names:
        if name == "log.jsonl":
            first, second = (
                [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder / name)]
                for folder in (run, other)
            )
            assert first == second
        else:
            assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_a_finished_run_is_extended_where_its_schedule_goes_on(tmp_path: Path, failing: Said) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--steps", "10") == 0
    assert train(parts) == 0
    assert "--steps: the run in" in failing("train", "maml", "--out", str(parts), "--resume", "--steps", "5")
    assert train(parts, "--resume", "--steps", "10", options="") == 0
    for name in ("config.json", "step-00000010.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    seconds = [record["seconds"] for record in read_log(parts / "log.jsonl")]
    assert seconds == sorted(seconds)

    falling = tmp_path / "falling"
    assert train(falling, "--schedule", "cosine") == 0
    said = failing("train", "maml", "--out", str(falling), "--resume", "--steps", "9")
    assert "--steps: the run" in said
    assert "has a cosine schedule, which ends after its 6 steps: only a constant one goes on, got 9" in said


def test_a_resumed_run_knows_its_options(run: Path, tmp_path: Path, failing: Said) -> None:
    parts = copied(run, tmp_path / "parts")
    find_checkpoint(parts).unlink()  # as if it had been killed after step 4
    assert train(parts, "--resume", options="--keep 3") == 0  # how often it writes is free
    first, second = (Checkpoint.read(find_checkpoint(path)).tensors for path in (run, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "holds a run of maml, not of fomaml" in failing("train", "fomaml", "--out", str(run), "--resume")
    absent = tmp_path / "absent"
    assert f"--out: {absent} does not exist" in failing("train", "maml", "--out", str(absent), "--resume")
    assert not absent.exists()


def test_a_configuration_that_was_edited(run: Path, tmp_path: Path, failing: Said) -> None:
    folder = copied(run, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    settings, training = {**config["settings"], "hidden": [5]}, {**config["training"], "lr": "x"}
    for change, message in (
        ('{"method"', "config.json: expected JSON"),
        (json.dumps({**config, "sead": 1}), "sead: unknown"),
        (
            json.dumps({**config, "settings": settings}),
            "expected the method and",
        ),
        (
            json.dumps({**config, "training": training}),
            "training.lr: expected a finite",
        ),
    ):
        (folder / "config.json").write_text(change)
        assert message in failing("eval", str(folder))
    checkpoint = find_checkpoint(run)
    assert main(["eval", str(checkpoint), "--episodes", "2"]) == 0  # a file alone says all


def test_images_that_changed_are_noticed(tmp_path: Path, failing: Said) -> None:
    data, out = images(tmp_path / "data"), tmp_path / "run"
    assert train(out, "--data", str(data), method="protonet", options=IMAGES) == 0
    resume = ["train", "protonet", "--out", str(out), "--resume"]
    assert main(resume) == 0
    picture = data / "train" / "b" / "2.png"
    PIL.fromarray(torch.zeros(16, 16, dtype=torch.uint8).numpy()).save(picture)
    assert f"--data: {data} has changed since the run" in failing(*resume)


def test_a_run_is_tried_on_other_data(
    tmp_path: Path, failing: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = images(tmp_path / "first"), images(tmp_path / "second")
    out = tmp_path / "run"
    assert train(out, "--data", str(first), method="protonet", options=IMAGES) == 0
    asked = ["eval", str(out), "--ways", "2", "--queries", "1", "--episodes", "3"]
    first.rename(tmp_path / "moved")
    assert "expected a folder of class folders" in failing(*asked)
    assert main([*asked, "--data", str(second)]) == 0
    assert f"3 episodes of {second} test" in capsys.readouterr().out
    said = failing(*asked, "--data", "sine")
    assert "--data: expected omniglot, digits or a folder, which protonet learns from, got sine" in said


# --- damage -------------------------------------------------------------------------------------------------


def test_flipped_bits_of_a_checkpoint_are_noticed(run: Path, tmp_path: Path) -> None:
    """Wherever: in the header or in the weights. None is read as other weights, and none is a traceback."""
    whole = find_checkpoint(run).read_bytes()
    flips = random.Random(0)
    broken = tmp_path / "broken.safetensors"
    for _ in range(400):
        place = flips.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << flips.randrange(8)
        broken.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"broken\.safetensors: "):
            Checkpoint.read(broken)


def test_flipped_bits_of_a_log_are_noticed(run: Path, tmp_path: Path, failing: Said) -> None:
    folder = copied(run, tmp_path / "x")
    log = folder / "log.jsonl"
    whole = log.read_bytes()
    for place in range(len(whole) - 1):  # without its last line break, a log is one that a kill cut short
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        log.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"log\.jsonl: line [123] is not as metafast wrote it"):
            read_log(log)
    assert "--out: " in failing("train", "maml", "--out", str(folder), "--resume")


def test_evaluation_falls_back_to_the_newest_whole_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path / "x")
    newest = find_checkpoint(folder)
    broken = bytearray(newest.read_bytes())
    broken[-1] ^= 1
    newest.write_bytes(broken)
    with pytest.warns(UserWarning, match=f"{newest.name}: its checksum does not fit.*the one before it is"):
        assert main(["eval", str(folder), "--episodes", "2"]) == 0
    assert "Mean squared error of maml" in capsys.readouterr().out


def rewritten(path: Path, to: Path, change: Callable[[dict, dict], None]) -> Path:
    """A checkpoint with another state or other tensors, and a checksum that fits."""
    from metafast.runs import checkpoint

    read = Checkpoint.read(path)
    state = {name: getattr(read, name) for name in ("step", "config", "optimizer", "scheduler")}
    change(state, read.tensors)
    to.parent.mkdir(exist_ok=True)
    checkpoint._write(to, read.tensors, state)
    return to


ODD = {
    "no state": (lambda state, tensors: state.clear(), "expected the state of a training"),
    "more state": (lambda state, tensors: state.update(epoch=1), "expected the state of a training"),
    "a list": (lambda state, tensors: state.update(config=[1]), "expected an object with method"),
    "no method": (lambda state, tensors: state["config"].pop("method"), "method: missing"),
    "another method": (lambda state, tensors: state["config"].update(method="protonet"), "settings."),
    "a method like it": (
        lambda state, tensors: state["config"].update(method="metasgd"),
        "settings.learn_inner",
    ),
    "a weight missing": (lambda state, tensors: tensors.pop("model.network.0.bias"), "network.0.bias"),
    "wrong shapes": (
        lambda state, tensors: tensors.update({"model.network.0.bias": torch.zeros(3)}),
        "network.0.bias",
    ),
    "other settings": (
        lambda state, tensors: state["config"]["settings"].update(hidden=[9]),
        "network.0.weight",
    ),
    "odd problem": (lambda state, tensors: state["config"]["problem"].update(outputs="x"), "problem"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_metadata_is_one_line(kind: str, run: Path, tmp_path: Path, failing: Said) -> None:
    change, message = ODD[kind]
    path = rewritten(find_checkpoint(run), tmp_path / "x" / "step-00000006.safetensors", change)
    assert message in failing("eval", str(path))


ODD_TRAINING = {
    "no random state": lambda state, tensors: tensors.pop("rng.cpu"),
    "a random state of another kind": lambda state, tensors: tensors.update({"rng.cpu": torch.zeros(3)}),
    "wrong moments": lambda state, tensors: tensors.update({"optimizer.0.exp_avg": torch.zeros(3)}),
    "moments of nothing": lambda state, tensors: tensors.update({"optimizer.99.exp_avg": torch.zeros(3)}),
    "no optimizer": lambda state, tensors: state.update(optimizer=None),
}


@pytest.mark.parametrize("kind", ODD_TRAINING)
def test_an_odd_state_of_training_is_one_line(kind: str, run: Path, tmp_path: Path, failing: Said) -> None:
    folder = copied(run, tmp_path / "x")
    for path in list_checkpoints(folder):
        rewritten(path, path, ODD_TRAINING[kind])
    said = failing("train", "maml", "--out", str(folder), "--resume")
    assert "expected the state of the optimizer, the schedule and the random numbers" in said


@pytest.mark.parametrize(
    "metadata", [None, {}, {"metafast-checkpoint-1": "x"}, {"metafast-checkpoint-2": "[1]"}]
)
def test_foreign_metadata_is_one_line(metadata: dict[str, str] | None, tmp_path: Path, failing: Said) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"x": torch.zeros(1)}, path, metadata)
    assert f"{path}: expected " in failing("eval", str(path))


# --- words and numbers --------------------------------------------------------------------------------------


def test_help_names_the_arguments_of_the_methods() -> None:
    from metafast.methods import METHODS

    for method in METHODS.values():
        kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, method


def test_the_extra_that_is_missing_is_named() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None; from metafast.program.cli import main; "
        "assert main(['info']) == main([]) == 0; sys.exit(main(['train', 'maml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "metafast: error: pydantic is not installed: pip install 'metafast[cli]'\n"


def test_no_command_prints_help_and_version_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: metafast" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"metafast {metafast.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian maml", "trian: unknown command (did you mean train?)"),
        ("train mmal", "mmal: unknown method (did you mean maml?)"),
        ("compare", "RUN"),
    ],
)
def test_a_misspelt_command_names_the_nearest(words: str, message: str, failing: Said) -> None:
    assert message in failing(*words.split())


def test_a_run_that_began_with_another_torch_is_told(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"began with torch 1.0, this is {re.escape(torch.__version__)}"):
        assert train(folder, "--resume", options="") == 0


def test_names_that_are_no_utf8(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    data = images(tmp_path / os.fsdecode(b"data-\xff"))
    out = tmp_path / os.fsdecode(b"run-\xff")
    assert train(out, "--data", str(data), method="protonet", options=IMAGES) == 0
    assert main(["train", "protonet", "--out", str(out), "--resume"]) == 0
    assert main(["eval", str(out), "--ways", "2", "--queries", "1", "--episodes", "2"]) == 0


def test_a_terminal_without_unicode(run: Path) -> None:
    words = [sys.executable, "-m", "metafast", "eval", str(run), "--episodes", "2"]
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=ascii, check=True)
    assert rb"\xb1" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    "options",
    [
        "--lr 1e400",
        "--inner-lr 1e400",
        "--ways 1000000000000000000000000000000",
        "--tasks 1000000000000",
        "--hidden 1000000000000",
        "--hidden 1000000000000000000000000000000",
        "--shots 1000000000000000000000000000000",
        "--seed 1000000000000000000000000000000",
        f"--out {300 * 'x'}",
        f"--data {300 * 'x'}",
    ],
)
def test_absurd_numbers_and_names_are_one_line(options: str, tmp_path: Path, failing: Said) -> None:
    name, value = options.split()
    sine = [] if name in ("--data", "--ways") else ["--data", "sine"]
    failing("train", "maml", *sine, "--out", str(tmp_path / "x"), name, value)


def test_an_instruction_set_that_is_none_is_one_line() -> None:
    words = [sys.executable, "-m", "metafast", "info"]
    environment = {**os.environ, "METAFAST_CPU_ISA": "nonsense"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("metafast: error: METAFAST_CPU_ISA: expected one")


# --- what people see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_step_total_loss_and_time_left_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from metafast.program.progress import Progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    record = {"step": 69999, "loss": 1.0, "accuracy": 0.98765, "seconds": 9.0, "episodes_per_second": 5.0}
    with Progress(0, 70000) as progress:
        progress.advance(69999, 0.0123456)
        progress.report(record)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    last = plain.rstrip("\n").split("\r")[-1].split("\n")[-1]
    assert len(last) <= width
    assert re.search(
        r"^step 69999/70000 .*loss 0\.0123  accuracy 98\.8% (\d+:\d\d|--:--) left$", last.strip()
    )


def test_console_and_log_mean_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    for line, record in zip(lines, read_log(tmp_path / "log.jsonl"), strict=True):
        assert f"step {record['step']}/6  loss {record['loss']:.3g}  mse {record['mse']:.3g}  " in line
        assert f"{record['episodes_per_second']:.1f} episodes/s" in line


def test_curves_and_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs metafast[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path, "--tensorboard") == 0
    with PIL.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert losses == [(record["step"], record["loss"]) for record in read_log(tmp_path / "log.jsonl")]


def test_runs_are_compared_on_the_same_episodes(
    run: Path, tmp_path: Path, failing: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    other, picture = tmp_path / "other", tmp_path / "compare.png"
    assert train(other, "--seed", "1") == 0
    capsys.readouterr()
    asked = ["--episodes", "20", "--figure", str(picture)]
    assert main(["compare", str(run), str(other), *asked]) == 0
    title, names, *rows, last = capsys.readouterr().out.splitlines()
    assert "10 points, 20 episodes of sine test" in title
    assert names.split() == ["run", "method", "mse", "behind", "the", "best", "the", "paper"]
    errors = {row.split()[0]: float(row.split()[2]) for row in rows}
    better, worse = sorted(rows, key=lambda row: errors[row.split()[0]])
    assert worse.count("±") == 2
    assert better.count("±") == 1
    difference = float(worse.split()[5])
    assert difference == pytest.approx(max(errors.values()) - min(errors.values()), abs=2e-3)
    assert str(picture) in last
    with PIL.open(picture) as drawn:
        assert drawn.width > 600

    out = tmp_path / "images"
    data = images(tmp_path / "data")
    assert train(out, "--data", str(data), method="protonet", options=IMAGES) == 0
    assert "expected runs on the same data" in failing("compare", str(run), str(out))
    of_images = ["--episodes", "5", "--ways", "2", "--queries", "1", "--figure", str(picture)]
    assert main(["compare", str(out), str(out), *of_images]) == 0
    assert "2-way 1-shot, 5 episodes of" in capsys.readouterr().out
