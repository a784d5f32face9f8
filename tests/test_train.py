"""The training loop: it learns, logs, stops at a loss that is not finite, and resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the training loop needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")

from metafast.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints
from metafast.data import Episodes, EpisodeSampler, ImageClasses
from metafast.evaluate import accuracy, estimate, evaluate
from metafast.methods import ProtoNet, conv4
from metafast.train import train

STEPS = 12


def classes() -> ImageClasses:
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(8, 1, 1, 16, 16, generator=generator)
    noise = torch.rand(8, 6, 1, 16, 16, generator=generator)
    return ImageClasses(centres + noise, tuple("abcdefgh"))


def run(
    directory: Path, *, steps: int = STEPS, resume: bool = False, pause: float = 0.0, **changes
) -> ProtoNet:
    """A run with all that has state: momentum, schedule, batch norm, dropout, channels-last weights."""
    torch.manual_seed(0)
    method = ProtoNet(nn.Sequential(conv4(1, 4), nn.Dropout(0.2)))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sampler = EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=2, seed=0)

    def batches(step: int) -> Episodes:
        time.sleep(pause)
        return sampler.batch(step)

    arguments = {
        "steps": steps,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "checkpoints": Checkpoints(directory, every=2, config={"name": "test"}),
        "resume": resume,
        "log": directory / "log.jsonl",
        "log_every": 1,
    }
    train(method, batches, **{**arguments, **changes})
    return method


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def tensors(directory: Path) -> dict[str, Tensor]:
    return Checkpoint.read(find_checkpoint(directory)).tensors


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = tensors(one), tensors(other)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    timings = {"seconds", "episodes_per_second"}

    def untimed(directory: Path) -> list[dict]:
        return [{k: v for k, v in record.items() if k not in timings} for record in records(directory)]

    assert untimed(one) == untimed(other)


def test_learns_and_logs_every_step(tmp_path: Path) -> None:
    run(tmp_path)
    log = records(tmp_path)
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["lr"] > log[-1]["lr"] > 0
    assert all(0 <= record["accuracy"] <= 1 for record in log)


def test_keeps_the_latest_checkpoints_and_nothing_partial(tmp_path: Path) -> None:
    run(tmp_path, steps=7)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.jsonl", "step-00000006.safetensors", "step-00000007.safetensors"]
    assert find_checkpoint(tmp_path) == tmp_path / names[-1]
    assert Checkpoint.read(tmp_path / names[-1]).config == {"name": "test"}


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", steps=stop)
    torch.rand(3)  # the generator's state must come out of the checkpoint
    run(tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resumes_bit_for_bit_after_kills_at_any_moment(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    killed = tmp_path / "killed"
    here = Path(__file__).resolve()
    code = f"import test_train as t; t.run(t.Path({str(killed)!r}), resume=True, pause=0.15)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    for checkpoints in (1, 2):  # the second kill hits a run that had been resumed
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        reached = 0
        while reached < 4 * checkpoints - 1 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
            log = killed / "log.jsonl"
            reached = log.read_text().count("\n") if log.exists() else 0
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < Checkpoint.read(find_checkpoint(killed)).step < STEPS
    (killed / "step-00000099.partial").write_bytes(b"half a checkpoint")
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 1')
    run(killed, resume=True)
    assert_same_run(tmp_path / "whole", killed)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def test_a_loss_that_is_not_finite_is_logged_and_not_learned_from(tmp_path: Path) -> None:
    sampler = EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=1)
    method = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)))
    before = [parameter.clone() for parameter in method.parameters()]

    def batches(step: int) -> Episodes:
        drawn = sampler.batch(step)
        return Episodes(drawn.support * torch.nan, drawn.support_labels, drawn.query, drawn.query_labels)

    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        train(method, batches, steps=3, optimizer=optimizer, log=tmp_path / "log.jsonl")
    assert records(tmp_path) == [{"step": 1, "error": "the loss is not finite", "loss": "nan"}]
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        run(tmp_path, steps=0)
    with pytest.raises(ValueError, match="resume: expected checkpoints"):
        run(tmp_path, resume=True, checkpoints=None)
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpoints(tmp_path, every=1, keep=0, config={})
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        find_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path / "absent") == []


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected format"):
        Checkpoint.read(tmp_path / "other.safetensors")


def test_confidence_interval() -> None:
    result = estimate(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    # standard deviation 0.5 (n - 1 in the denominator), standard error 0.25
    assert result.mean == 0.75
    assert result.half_width == pytest.approx(1.959964 * 0.25, rel=1e-6)
    assert str(result) == "75.00 ± 49.00 %"
    with pytest.raises(ValueError, match="values: expected"):
        estimate(torch.tensor([1.0]))


def test_accuracy_ignores_padding_and_restores_the_mode() -> None:
    drawn = EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=4).batch(0)
    method = ProtoNet(conv4(1, 4)).train()
    right = method.eval().log_probs(drawn).argmax(-1)
    labels = (right + torch.tensor([0, 0, 0, 1, 0, 1])) % 3
    labels[:, 0] = -100
    asked = Episodes(drawn.support, drawn.support_labels, drawn.query, labels)
    assert accuracy(method.train(), asked).tolist() == pytest.approx([0.6] * 4)
    assert method.training
    assert evaluate(method, [asked, asked]).mean == pytest.approx(0.6)
