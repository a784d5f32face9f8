"""The training loop: it learns, logs, stops at a loss that is not finite, and resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the training loop needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")

from metafast import CoordinatewiseLSTM
from metafast.data import (
    Episodes,
    EpisodeSampler,
    ImageClasses,
    Optimizees,
    QuadraticSampler,
    ScaledSampler,
    SineSampler,
)
from metafast.methods import MAML, LearnedOptimizer, Learner, Method, ProtoNet, conv4, mlp
from metafast.program.evaluate import estimate, evaluate, score
from metafast.program.learning_curves import final_loss
from metafast.program.train import Batch, train
from metafast.runs.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints
from metafast.runs.log import TIMES, read_log

STEPS = 12


def classes() -> ImageClasses:
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(8, 1, 1, 16, 16, generator=generator)
    noise = torch.rand(8, 6, 1, 16, 16, generator=generator)
    return ImageClasses(centres + noise, tuple("abcdefgh"))


def images() -> tuple[Method, Callable[[int], Episodes]]:
    """All that has state: batch norm, dropout, channels-last weights."""
    method = ProtoNet(nn.Sequential(conv4(1, 4), nn.Dropout(0.2)))
    return method, EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=2, seed=0).batch


def waves() -> tuple[Method, Callable[[int], Episodes]]:
    """Weights and learned rates; the steps begin in the middle of a sampler's block."""
    sampler = SineSampler(shots=5, queries=5, tasks=3)
    method = MAML(mlp(1, [8, 8], 1), loss="mse", lr=0.01, steps=2, learn_lr=True)
    return method, lambda step: sampler.batch(step + 60)


def optimizees() -> tuple[Learner, Callable[[int], Optimizees]]:
    """Problems instead of episodes."""
    sampler = ScaledSampler(QuadraticSampler(tasks=3, steps=8), size=1.0)
    return LearnedOptimizer(CoordinatewiseLSTM(5), truncation=4), sampler.batch


def run(
    directory: Path,
    *,
    problem: str = "images",
    steps: int = STEPS,
    resume: bool = False,
    pause: float = 0.0,
    method: tuple[Learner, Callable[[int], Batch]] | None = None,
    **changes,
) -> Learner:
    """A run with momentum and a schedule, of ``method`` and its batches, else by the name of a problem."""
    if method is None:
        torch.manual_seed(0)
        method = {"images": images, "waves": waves, "optimizees": optimizees}[problem]()
    method, draw = method
    if problem == "optimizees":
        changes = {"result": final_loss, **changes}
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def batches(step: int) -> Batch:
        time.sleep(pause)
        return draw(step)

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
    return read_log(directory / "log.jsonl")


def tensors(directory: Path) -> dict[str, Tensor]:
    return Checkpoint.read(find_checkpoint(directory)).tensors


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = tensors(one), tensors(other)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name

    def untimed(directory: Path) -> list[dict]:
        return [{k: v for k, v in record.items() if k not in TIMES} for record in records(directory)]

    assert untimed(one) == untimed(other)


@pytest.mark.parametrize(
    ("problem", "figure"), [("images", "accuracy"), ("waves", "mse"), ("optimizees", "final_loss")]
)
def test_learns_and_logs_every_step(tmp_path: Path, problem: str, figure: str) -> None:
    run(tmp_path, problem=problem)
    log = records(tmp_path)
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["lr"] > log[-1]["lr"] > 0
    assert all(record[figure] >= 0 for record in log)


def test_keeps_the_latest_checkpoints_and_nothing_partial(tmp_path: Path) -> None:
    run(tmp_path, steps=7)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.jsonl", "step-00000006.safetensors", "step-00000007.safetensors"]
    assert find_checkpoint(tmp_path) == tmp_path / names[-1]
    assert Checkpoint.read(tmp_path / names[-1]).config == {"name": "test"}


@pytest.mark.parametrize("problem", ["images", "waves", "optimizees"])
@pytest.mark.parametrize("stop", [1, 5, 6])
def test_resumes_bit_for_bit(tmp_path: Path, stop: int, problem: str) -> None:
    run(tmp_path / "whole", problem=problem)
    run(tmp_path / "parts", problem=problem, steps=stop)
    torch.rand(3)  # the generator's state must come out of the checkpoint
    run(tmp_path / "parts", problem=problem, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("problem", ["images", "waves", "optimizees"])
def test_resumes_bit_for_bit_after_kills_at_any_moment(tmp_path: Path, problem: str) -> None:
    run(tmp_path / "whole", problem=problem)
    killed = tmp_path / "killed"
    here = Path(__file__).resolve()
    arguments = f"t.Path({str(killed)!r}), problem={problem!r}, resume=True, pause=0.15"
    code = f"import test_train as t; t.run({arguments})"
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
    run(killed, problem=problem, resume=True)
    assert_same_run(tmp_path / "whole", killed)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    run(tmp_path / "plain")
    run(tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def spoiled(drawn: Episodes, tasks: list[int], value: float) -> Episodes:
    """The same episodes, but that some have a support on which the inner loop diverges."""
    support = drawn.support.clone()
    support[tasks] *= value
    return replace(drawn, support=support)


def maml() -> MAML:
    torch.manual_seed(0)
    return MAML(mlp(1, [8], 1), loss="mse", lr=0.01, steps=3)


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_a_step_goes_by_the_tasks_that_did_not_diverge(tmp_path: Path, value: float) -> None:
    sampler = SineSampler(shots=5, queries=5, tasks=4)
    whole, some = maml(), maml()

    def diverging(step: int) -> Episodes:
        return spoiled(sampler.batch(step), [0, 2], value) if step == 1 else sampler.batch(step)

    def without(step: int) -> Episodes:
        return sampler.batch(step).take(torch.tensor([1, 3])) if step == 1 else sampler.batch(step)

    for method, batches, name in ((whole, diverging, "whole"), (some, without, "some")):
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
        log = tmp_path / name / "log.jsonl"
        train(method, batches, steps=3, optimizer=optimizer, log=log, log_every=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), some.parameters(), strict=True))
    assert records(tmp_path / "whole")[0] == {"step": 2, "diverged": 2}
    assert [record["step"] for record in records(tmp_path / "whole")] == [2, 3]
    assert [record["step"] for record in records(tmp_path / "some")] == [3]


def test_a_gradient_that_is_not_finite_is_not_learned_from(tmp_path: Path) -> None:
    class Overflowing(MAML):
        """A finite loss whose gradient is not: the square root at zero."""

        def loss(self, episodes: Episodes) -> Tensor:
            return super().loss(episodes) + (self.params[0].sum() * 0).sqrt()

    torch.manual_seed(0)
    method = Overflowing(mlp(1, [8], 1), loss="mse", lr=0.01, steps=1)
    before = [parameter.clone() for parameter in method.parameters()]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        train(method, SineSampler(shots=2, queries=2, tasks=2).batch, steps=1, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_a_step_goes_by_the_problems_that_did_not_diverge(tmp_path: Path) -> None:
    sampler = QuadraticSampler(tasks=4, steps=4)

    def diverging(step: int) -> Optimizees:
        drawn = sampler.batch(step)
        if step == 1:
            drawn.matrix[[0, 2]] = torch.nan
        return drawn

    def without(step: int) -> Optimizees:
        return sampler.batch(step).take(torch.tensor([1, 3])) if step == 1 else sampler.batch(step)

    trained = []
    for batches in (diverging, without):
        torch.manual_seed(0)
        method = LearnedOptimizer(CoordinatewiseLSTM(5), truncation=4)
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
        log = tmp_path / "log.jsonl"
        train(method, batches, steps=3, optimizer=optimizer, result=final_loss, log=log, log_every=3)
        trained.append(list(method.parameters()))
    for whole, some in zip(*trained, strict=True):
        assert torch.equal(whole, some)


@pytest.mark.parametrize("scale", [1e30, torch.nan])
def test_a_score_that_is_not_finite_is_null_in_the_log(tmp_path: Path, scale: float) -> None:
    """The inner loop of evaluation may diverge where that of training does not."""
    torch.manual_seed(0)
    method = MAML(mlp(1, [8], 1), loss="mse", lr=0.01, steps=0, test_steps=3)
    sampler = SineSampler(shots=5, queries=5, tasks=2)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
    log = tmp_path / "log.jsonl"
    train(
        method,
        lambda step: spoiled(sampler.batch(step), [0], scale),
        steps=1,
        optimizer=optimizer,
        log=log,
        log_every=1,
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(log.read_text(), parse_constant=refuse)
    assert record["mse"] is None
    assert record["error"] in ("mse is nan", "mse is inf")
    assert record["loss"] > 0


def test_a_later_checkpoint_that_is_broken_crowds_out_none(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    (tmp_path / "step-00000099.safetensors").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"step-00000099.*; the one before it is taken"):
        run(tmp_path, steps=8, resume=True)
    steps = [int(path.stem.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert steps == [6, 8, 99]


def test_checkpoints_of_which_none_can_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"step-00000001.safetensors: expected a whole safetensors file"):
        run(tmp_path, resume=True)


def test_training_stops_where_every_task_diverges(tmp_path: Path) -> None:
    sampler = SineSampler(shots=5, queries=5, tasks=2)
    method = maml()
    before = [parameter.clone() for parameter in method.parameters()]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)

    def batches(step: int) -> Episodes:
        return spoiled(sampler.batch(step), [0, 1], torch.nan)

    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        train(method, batches, steps=3, optimizer=optimizer, log=tmp_path / "log.jsonl")
    assert records(tmp_path) == [
        {"step": 1, "diverged": 2, "error": "no task has a finite loss and gradient"}
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        run(tmp_path, steps=0)
    with pytest.raises(ValueError, match="resume: expected checkpoints"):
        run(tmp_path, resume=True, checkpoints=None)
    (tmp_path / "other.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match=r"other.jsonl was not written by metafast"):
        run(tmp_path, log=tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpoints(tmp_path, every=1, keep=0, config={})
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        find_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path / "absent") == []


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected format 'metafast-checkpoint-2', got another"):
        Checkpoint.read(tmp_path / "other.safetensors")


def test_confidence_interval() -> None:
    result = estimate(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    # standard deviation 0.5 (n - 1 in the denominator), standard error 0.25
    assert result.mean == 0.75
    assert result.half_width == pytest.approx(1.959964 * 0.25, rel=1e-6)
    assert f"{result:.2%}" == "75.00 ± 49.00 %"
    assert f"{result:.3f}" == "0.750 ± 0.490"
    with pytest.raises(ValueError, match="values: expected"):
        estimate(torch.tensor([1.0]))


def test_accuracy_ignores_padding_and_restores_the_mode() -> None:
    drawn = EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=4).batch(0)
    method = ProtoNet(conv4(1, 4)).train()
    right = method.eval().predict(drawn).argmax(-1)
    labels = (right + torch.tensor([0, 0, 0, 1, 0, 1])) % 3
    labels[:, 0] = -100
    asked = Episodes(drawn.support, drawn.support_labels, drawn.query, labels)
    assert score(method.train(), asked).tolist() == pytest.approx([0.6] * 4)
    assert method.training
    assert evaluate(method, [asked, asked]).mean == pytest.approx(0.6)


def test_a_prediction_that_fails_leaves_the_mode_as_it_was() -> None:
    method = maml().train()

    def fails(episodes: Episodes) -> Tensor:
        assert not method.training
        raise RuntimeError("no prediction")

    with pytest.raises(RuntimeError, match="no prediction"):
        score(method, SineSampler(shots=1, queries=1, tasks=1).batch(0), fails)
    assert method.training


def test_the_score_of_a_regression_is_its_squared_error() -> None:
    drawn = SineSampler(shots=5, queries=7, tasks=3).batch(0)
    method = maml()
    expected = (method.predict(drawn, 2) - drawn.query_labels).square().mean((1, 2))
    got = score(method, drawn, lambda episodes: method.predict(episodes, 2))
    torch.testing.assert_close(got, expected)
    assert evaluate(method, [drawn]).mean == pytest.approx(float(score(method, drawn).mean()))
