"""Data parallel over tasks: ranks take the steps of one process, stop together, and resume on any number."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
pytest.importorskip("rich", reason="training needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
if not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from test_train import classes, images, optimizees

from metafast.data import Episodes, EpisodeSampler, SineSampler
from metafast.methods import MAML, RNN, SNAIL, Learner, ProtoNet, RelationNet, Reptile, Siamese, conv4, mlp
from metafast.methods.relation import LinearRelation
from metafast.program.cli import main
from metafast.program.distributed import Ranks, joined
from metafast.program.learning_curves import final_loss
from metafast.program.train import train
from metafast.runs.checkpoint import Checkpoint, Checkpoints, find_checkpoint, list_checkpoints
from metafast.runs.log import TIMES, read_log

HERE = Path(__file__).resolve()
STEPS = 4


# --- what the ranks of one launch do ------------------------------------------------------------------------


def waves(step: int) -> Episodes:
    """Five tasks, of which in step 1 one diverges and in step 2 all of the first rank's."""
    drawn = SineSampler(shots=5, queries=5, tasks=5).batch(step)
    support = drawn.support.clone()
    support[{1: [3], 2: [0, 1]}.get(step, [])] = torch.nan
    return replace(drawn, support=support)


def maml() -> Learner:
    return MAML(mlp(1, [8, 8], 1), loss="mse", lr=0.01, steps=2, learn_lr=True)


def embedding() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 6, bias=False))  # Siamese's would have no gradient


def characters(step: int) -> Episodes:
    return EpisodeSampler(classes(), ways=3, shots=1, queries=2, tasks=4, seed=0).batch(step)


PROBLEMS: dict[str, Callable[[], tuple[Learner, Callable]]] = {
    "waves": lambda: (maml(), waves),
    "reptile": lambda: (Reptile(mlp(1, [8], 1), loss="mse", lr=0.01, steps=2), waves),
    "optimizees": optimizees,
    "siamese": lambda: (Siamese(embedding(), 6), characters),
    "relation": lambda: (RelationNet(embedding(), LinearRelation(6, 4)), characters),
}


def run(problem: str, out: Path, ranks: Ranks, **changes) -> Learner:
    torch.manual_seed(0)
    method, batches = {**PROBLEMS, "images": images}[problem]()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
    arguments = {
        "steps": STEPS,
        "optimizer": optimizer,
        "checkpoints": Checkpoints(out, every=2, config={}),
        "log": out / "log.jsonl",
        "log_every": 1,
        "ranks": ranks,
    }
    if problem == "optimizees":
        arguments["result"] = final_loss
    train(method, batches, **{**arguments, **changes})
    return method


WRAPPED: dict[str, Callable[[], Learner]] = {
    "maml": lambda: MAML(mlp(256, [8], 3), loss="cross_entropy", lr=0.1, steps=2),
    "protonet": lambda: ProtoNet(conv4(1, 4)),
    "snail": lambda: SNAIL(embedding(), 6, 3, 4, filters=4),
    "rnn": lambda: RNN(embedding(), 6, 3, hidden=4),
}


def gradients(name: str, share: Callable[[Episodes], Episodes] | None, rank: int) -> list[torch.Tensor]:
    """Of a step of a method, in DistributedDataParallel where there is a share."""
    torch.manual_seed(0)
    method = WRAPPED[name]()
    torch.manual_seed(1 + rank)
    episodes = characters(0)
    if share is None:
        method(episodes.take(slice(2 * rank, 2 * rank + 2))).backward()
    else:
        wrapped = DistributedDataParallel(method)
        wrapped(share(episodes)).backward()
    return [parameter.grad for parameter in method.parameters()]


def work(out: Path) -> None:
    """All that two ranks do; each keeps what it has found."""
    with joined() as ranks:
        found = {name: list(run(name, out / name, ranks).parameters()) for name in PROBLEMS}
        run("images", out / "whole", ranks)
        run("images", out / "parts", ranks, steps=3)
        torch.rand(3)  # the generator's state must come out of the checkpoint
        run("images", out / "parts", ranks, resume=True)
        stopping = run("waves", out / "stopped", ranks, steps=10**6, stop=lambda: ranks.rank == 1)
        found |= {f"wrapped {name}": gradients(name, ranks.share, ranks.rank) for name in WRAPPED}
        try:
            ranks.share(waves(0).take(slice(1)))
        except ValueError as error:
            found["too few"] = str(error)
        found["stopped"] = list(stopping.parameters())
        torch.save(found, out / f"rank-{ranks.rank}.pt")


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun gives the ranks."""
    given = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in given.items()}}


def launch(*words: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *words], env=environment(rank, port), **pipes) for rank in range(2)
    ]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    processes = launch("-c", f"import pathlib, test_ranks as t; t.work(pathlib.Path({str(out)!r}))")
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return out


def found(out: Path, rank: int) -> dict:
    return torch.load(out / f"rank-{rank}.pt")


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_ranks_take_the_steps_of_one(problem: str, worked: Path, tmp_path: Path) -> None:
    alone = run(problem, tmp_path, Ranks())
    first, second = (found(worked, rank)[problem] for rank in range(2))
    for parameter, here, there in zip(alone.parameters(), first, second, strict=True):
        assert torch.equal(here, there)
        torch.testing.assert_close(here, parameter, rtol=1e-4, atol=1e-5)
    for one, two in zip(*(read_log(out / "log.jsonl") for out in (tmp_path, worked / problem)), strict=True):
        assert one.keys() == two.keys()
        assert one.get("diverged") == two.get("diverged")
        if problem != "reptile":  # whose loss is the distance to where a rank's own tasks end
            numbers = {k: v for k, v in one.items() if k not in TIMES and isinstance(v, (int, float))}
            assert numbers == pytest.approx({name: two[name] for name in numbers}, rel=1e-3)


def test_ranks_resume_bit_for_bit(worked: Path) -> None:
    """With dropout, and running statistics."""
    whole, parts = (Checkpoint.read(find_checkpoint(worked / name)) for name in ("whole", "parts"))
    assert whole.step == parts.step == STEPS
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    logs = [read_log(worked / name / "log.jsonl") for name in ("whole", "parts")]
    for log in logs:
        for record in log:
            del record["seconds"], record["episodes_per_second"]
    assert logs[0] == logs[1]


def test_ranks_stop_at_the_same_step(worked: Path) -> None:
    assert [checkpoint.name for checkpoint in list_checkpoints(worked / "stopped")] == [
        "step-00000001.safetensors"
    ]
    one, two = (found(worked, rank)["stopped"] for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_fewer_tasks_than_ranks_are_refused(worked: Path) -> None:
    for rank in range(2):
        assert found(worked, rank)["too few"] == "tasks: expected at least 2, one for each rank, got 1"


@pytest.mark.parametrize("name", WRAPPED)
def test_methods_in_distributed_data_parallel(name: str, worked: Path) -> None:
    expected = [
        torch.stack(pair).mean(0) for pair in zip(*(gradients(name, None, r) for r in range(2)), strict=True)
    ]
    for rank in range(2):
        for gradient, mean in zip(found(worked, rank)[f"wrapped {name}"], expected, strict=True):
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)


# --- the command line ---------------------------------------------------------------------------------------

ENDLESS = "--data sine --hidden 4 --tasks 3 --steps 1000000 --checkpoint-every 20 --log-every 1000000"


def wait_for(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        checkpoints = list_checkpoints(out)
        if checkpoints and int(checkpoints[-1].stem[5:]) > step:
            return
        time.sleep(0.02)
    process.terminate()  # which torchrun passes on
    raise AssertionError(process.communicate())


def test_signals_and_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal to one rank saves and ends both; a killed one ends both; one process goes on."""
    out = tmp_path / "run"
    processes = launch("-m", "metafast", "train", "maml", "--out", str(out), *ENDLESS.split())
    wait_for(out, 0, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    said = "".join(text for process in processes for text in process.communicate(timeout=120))
    assert [process.returncode for process in processes] == [143, 143], said
    assert "3 tasks a step, 1000000 steps, cpu in torch.float32, 2 ranks" in said
    (step,) = re.findall(r"stopped after step (\d+) of 1000000, which is saved", said)
    assert Checkpoint.read(find_checkpoint(out)).step == int(step)

    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "metafast", "train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    torchrun = subprocess.Popen([sys.executable, *words, "maml", "--out", str(out), "--resume"], **pipes)
    wait_for(out, int(step), torchrun)
    os.kill(json.loads((out / ".trainer.json").read_text())["pid"], signal.SIGKILL)
    printed, said = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 1
    assert f"resumes after step {step}" in printed
    assert [line for line in said.splitlines() if line.startswith("metafast: ")] == [
        "metafast: error: another rank has ended, and so does this training; --resume goes on after the last "
        "checkpoint, on any number of ranks"
    ]

    reached = Checkpoint.read(find_checkpoint(out)).step
    assert reached > int(step)

    def send() -> None:
        while int(find_checkpoint(out).stem[5:]) <= reached:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert main(["train", "maml", "--out", str(out), "--resume"]) == 143
    assert f"resumes after step {reached}" in capsys.readouterr().out


def test_an_error_of_all_ranks_is_one_line(tmp_path: Path) -> None:
    words = f"-m metafast train maml --data sine --tasks 1 --out {tmp_path / 'x'}"
    processes = launch(*words.split())
    said = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert said == "metafast: error: --tasks: expected at least 2, one for each rank, got 1\n"
    assert [process.returncode for process in processes] == [1, 1]
