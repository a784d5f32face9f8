"""The meta-LSTM: the cell against gradient descent and its definition, the method, and its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_methods import episodes
from torch import Tensor, nn
from torch.func import functional_call

import metafast
from metafast import MetaLSTM, reference
from metafast.data import Episodes
from metafast.methods import MetaLSTMLearner, mlp
from metafast.ops.learned_optimizer import state_views

RATE = 0.3
DOUBLE = torch.float64


def tensors(steps: int | None = None) -> list[Tensor]:
    """Of a convolution, a bias and a number; each [...], or [K, ...]."""
    lead = () if steps is None else (steps,)
    return [torch.randn((*lead, *shape), dtype=DOUBLE) for shape in ((7, 3, 3, 3), (65,), ())]


def descent(layers: int) -> MetaLSTM:
    """A cell with f = 1 and i = RATE, whatever it sees."""
    cell = MetaLSTM(6, layers, input_gate=RATE, dtype=DOUBLE)
    with torch.no_grad():
        cell.weight_gates.zero_()
        cell.bias_gates[1] = 100.0  # of which the sigmoid is 1
    return cell


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_with_fixed_gates_it_is_gradient_descent(layers: int) -> None:
    torch.manual_seed(0)
    cell, theta, grads = descent(layers), tensors(), tensors(4)
    losses = torch.rand(4, dtype=DOUBLE)
    expected, got, state = theta, theta, cell.initial_state(theta)
    for step in range(4):
        along = [grad[step] for grad in grads]
        expected, _ = metafast.sgd_update(expected, along, RATE)
        got, state = cell(got, along, losses[step], state)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    unrolled, end = cell.unroll(theta, grads, losses, cell.initial_state(theta))
    torch.testing.assert_close([path[-1] for path in unrolled], expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(end, state)


@pytest.mark.parametrize("layers", [0, 1])
def test_it_begins_close_to_gradient_descent(layers: int) -> None:
    torch.manual_seed(0)
    cell = MetaLSTM(layers=layers, input_gate=0.01, forget_gate=0.993)
    theta = [torch.randn(1000)]
    _, state = cell(theta, [torch.randn(1000)], torch.tensor(1.6), cell.initial_state(theta))
    gates = state_views(state, hidden=cell.hidden, layers=layers).gates.flatten(0, 1)[:1000]
    torch.testing.assert_close(gates[:, 0], torch.full((1000,), 0.01), rtol=0.2, atol=0)
    torch.testing.assert_close(1 - gates[:, 1], torch.full((1000,), 0.007), rtol=0.2, atol=0)
    assert gates.std(0).min() > 0  # but they do see


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_steps_and_unroll_are_the_reference(layers: int) -> None:
    torch.manual_seed(0)
    cell = MetaLSTM(5, layers, p=7.0, input_gate=0.2, dtype=DOUBLE)
    nn.init.normal_(cell.weight_gates)
    theta, grads, losses = tensors(), tensors(3), torch.rand(3, dtype=DOUBLE)
    begin = cell.initial_state(theta)
    expected = reference.learned_optimizer.meta_lstm_unroll(theta, grads, losses, begin, cell.weights, p=7.0)
    unrolled = cell.unroll(theta, grads, losses, begin)
    torch.testing.assert_close(unrolled, expected)
    state = begin
    for step in range(3):
        theta, state = cell(theta, [grad[step] for grad in grads], losses[step], state)
        torch.testing.assert_close(theta, [path[step] for path in expected[0]])
    torch.testing.assert_close(state, expected[1])


def test_the_state_may_be_bfloat16() -> None:
    theta = [torch.randn(70)]
    cell = MetaLSTM(4)
    begin = cell.initial_state(theta, torch.bfloat16)
    assert begin.shape == (2, 10, 64)
    assert begin.dtype == torch.bfloat16
    moved, state = cell(theta, [torch.ones(70)], torch.tensor(1.0), begin)
    assert moved[0].dtype == torch.float32
    assert state.dtype == torch.bfloat16


def test_weights_are_saved_and_loaded() -> None:
    saved = nn.ModuleDict({"cell": MetaLSTM(5, 2)})
    loaded = nn.ModuleDict({"cell": MetaLSTM(5, 2)})
    loaded.load_state_dict(saved.state_dict())
    pairs = zip(saved["cell"].weights, loaded["cell"].weights, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (MetaLSTM(8), "hidden: expected the weights of a cell with 20, got 8"),
        (MetaLSTM(20, 0), "layers: expected the weights of a cell with 1, got 0"),
        (MetaLSTM(20, 2), "layers: expected the weights of a cell with 1, got 2"),
        (MetaLSTM(p=7.0), r"p: expected the weights of a cell with 10\.0, got 7\.0"),
    ],
)
def test_weights_of_another_cell_are_refused(other: MetaLSTM, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        MetaLSTM().load_state_dict(other.state_dict())
    assert "size mismatch" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"layers": 4}, "layers: expected 0 to 3, got 4"),
        ({"p": 0.0}, "p: expected a number > 0, at most 88, got 0.0"),
        ({"input_gate": 1.0}, "input_gate: expected a number between 0 and 1, got 1.0"),
        ({"forget_gate": 0.0}, "forget_gate: expected a number between 0 and 1, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaLSTM(**arguments)


def test_a_state_of_other_parameters_is_refused() -> None:
    cell, theta = MetaLSTM(4), [torch.randn(70)]
    with pytest.raises(ValueError, match="state"):
        cell(theta, theta, torch.tensor(1.0), cell.initial_state([torch.randn(64)]))


# --- the method -----------------------------------------------------------------------------------------


def drawings(dtype: torch.dtype = DOUBLE) -> Episodes:
    drawn = episodes(side=5)
    return Episodes(drawn.support.to(dtype), drawn.support_labels, drawn.query.to(dtype), drawn.query_labels)


def learner(layers: int = 1, *, steps: int = 3, dtype: torch.dtype = DOUBLE) -> MetaLSTMLearner:
    torch.manual_seed(0)
    network, cell = mlp(25, [6], 4, "tanh"), MetaLSTM(5, layers, input_gate=0.2)
    nn.init.normal_(cell.weight_gates, std=0.3)
    return MetaLSTMLearner(network, cell, loss="cross_entropy", steps=steps).to(dtype)


def definition(method: MetaLSTMLearner, drawn: Episodes, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The mean query loss and the log-probabilities, a task and a step at a time; gradients constant."""
    losses, log_probs = [], []
    names = [name for name, _ in method.network.named_parameters()]
    for task in range(len(drawn)):
        theta = list(method.network.parameters())
        state = method.cell.initial_state(theta)
        for _ in range(steps):
            at = [p.detach().requires_grad_() for p in theta]
            x = drawn.support[task].flatten(1)
            out = functional_call(method.network, dict(zip(names, at, strict=True)), (x,))
            loss = nn.functional.cross_entropy(out, drawn.support_labels[task])
            grads = torch.autograd.grad(loss, at)
            theta, state = reference.learned_optimizer.meta_lstm_step(
                theta, grads, loss.detach(), state, method.cell.weights
            )
        x = drawn.query[task].flatten(1)
        out = functional_call(method.network, dict(zip(names, theta, strict=True)), (x,))
        losses.append(nn.functional.cross_entropy(out, drawn.query_labels[task]))
        log_probs.append(out.log_softmax(-1))
    return torch.stack(losses).mean(), log_probs


@pytest.mark.parametrize("layers", [0, 1])
def test_the_method_is_its_definition(layers: int) -> None:
    method, drawn = learner(layers), drawings()
    expected, log_probs = definition(method, drawn, 3)
    loss = method.loss(drawn)
    torch.testing.assert_close(loss, expected)
    parameters = list(method.parameters())
    assert len(parameters) == 4 + len(method.cell.weights)
    got = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(got, torch.autograd.grad(expected, parameters))
    torch.testing.assert_close(method.predict(drawn), torch.stack(log_probs))
    with torch.no_grad():
        torch.testing.assert_close(method.predict(drawn), torch.stack(log_probs))
    for steps in (0, 5):
        _, log_probs = definition(method, drawn, steps)
        torch.testing.assert_close(method.predict(drawn, steps), torch.stack(log_probs))


def test_labels_may_be_left_out() -> None:
    method, drawn = learner(), drawings()
    labels = drawn.support_labels.clone()
    labels[:, ::2] = -100
    some = Episodes(drawn.support, labels, drawn.query, drawn.query_labels)
    kept = Episodes(drawn.support[:, 1::2], drawn.support_labels[:, 1::2], drawn.query, drawn.query_labels)
    torch.testing.assert_close(method.loss(some), method.loss(kept))


@pytest.mark.parametrize("layers", [0, 1])
def test_the_cell_learns_to_learn(layers: int) -> None:
    method, drawn = learner(layers, dtype=torch.float32), drawings(torch.float32)
    before = method.loss(drawn).item()
    cell = [weight.clone() for weight in method.cell.weights]
    optimizer = torch.optim.Adam(method.cell.parameters(), lr=0.02)  # the initialisation stays
    for _ in range(30):
        optimizer.zero_grad()
        method.loss(drawn).backward()
        optimizer.step()
    assert method.loss(drawn).item() < 0.9 * before
    assert not any(torch.equal(one, other) for one, other in zip(cell, method.cell.weights, strict=True))


def test_a_task_does_not_depend_on_the_others() -> None:
    method, drawn = learner(), drawings()
    alone = torch.cat([method.predict(drawn.take(slice(task, task + 1))) for task in range(len(drawn))])
    torch.testing.assert_close(method.predict(drawn), alone)


# --- the command line -----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """train/ and test/ with four classes of nine images: a patch in a place of its own, and noise."""
    pillow = pytest.importorskip("PIL.Image", reason="image folders need metafast[cli]")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in range(4):
            folder = tmp_path / "images" / split / str(name)
            folder.mkdir(parents=True)
            for example in range(9):
                picture = 60 * torch.rand(8, 8, generator=generator)
                row, column = divmod(name, 2)
                picture[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] += 180
                pillow.fromarray(picture.to(torch.uint8).numpy()).save(folder / f"{example}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("layers", [0, 1])
def test_trains_resumes_bit_for_bit_and_evaluates(
    layers: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
    pytest.importorskip("rich", reason="training needs metafast[cli]")
    pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
    from metafast.program.cli import main
    from metafast.runs.checkpoint import Checkpoint, find_checkpoint

    sizes = "--image-size 8 --no-center --hidden 8 --ways 3 --shots 5 --queries 2 --tasks 2 --steps 60"
    cell = f"--cell-layers {layers}" + (" --cell-hidden 4" if layers else "")
    runs = f"{cell} --checkpoint-every 40 --log-every 20 --lr 0.02"
    train = ["train", "meta-lstm", "--data", str(images), *sizes.split(), *runs.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        assert main([*train, "--out", str(out)]) == 0
    find_checkpoint(parts).unlink()  # as if it had been killed after step 40
    assert main([*train, "--out", str(parts), "--resume"]) == 0
    first, second = (Checkpoint.read(find_checkpoint(path)).tensors for path in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    cell = MetaLSTM.from_checkpoint(whole)
    assert (cell.layers, cell.p) == (layers, 10.0)
    assert cell.hidden == 4 or layers == 0  # without layers nothing has so many units
    for name, weight in cell.named_parameters():
        assert torch.equal(weight, first[f"model.cell.{name}"])
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [20, 40, 60]
    assert log[-1]["loss"] < log[0]["loss"]

    assert main([*train, "--out", str(parts), "--resume", "--cell-layers", "2"]) == 1
    assert "--cell-layers: the run in" in capsys.readouterr().err
    few = ["--ways", "3", "--shots", "5", "--queries", "2", "--episodes", "20"]
    assert main(["eval", str(whole), *few, "--sgd", "0.001", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" by SGD at 0.001" in line for line in lines] == [False, True, False]
    learned, slow, _ = (float(line.split(": ")[1].split(" ±")[0]) for line in lines)
    assert learned > 80  # chance is 33
    assert learned > slow


def test_under_autocast_the_cell_runs_in_float32() -> None:
    torch.manual_seed(0)
    cell = MetaLSTM(6, 1)
    theta, grads, loss = [torch.randn(70)], [torch.randn(70)], torch.tensor(1.5)
    expected, expected_state = cell(theta, grads, loss, cell.initial_state(theta))
    with torch.autocast("cpu", torch.bfloat16):
        stepped, state = cell(theta, grads, loss.bfloat16(), cell.initial_state(theta))
        in_place, in_place_state = [theta[0].clone()], cell.initial_state(theta)
        cell.step_(in_place, grads, loss, in_place_state)
    for found in ([stepped[0], state], [in_place[0], in_place_state]):
        torch.testing.assert_close(found, [expected[0].detach(), expected_state.detach()], check_stride=False)


def test_without_steps_the_gradient_is_that_of_where_they_begin() -> None:
    torch.manual_seed(0)
    method = MetaLSTMLearner(mlp(25, [5], 4, "relu"), MetaLSTM(3, 1), loss="cross_entropy", steps=0)
    method.loss(episodes(side=5)).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in method.params)
