"""The learned optimizer's module, and its use in the place of torch.optim.Adam."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metafast
from metafast import CoordinatewiseLSTM, LSTMOptimizer
from metafast.data import QuadraticSampler
from metafast.methods import LearnedOptimizer
from metafast.reference import learned_optimizer as reference


def cell(
    hidden: int = 5, layers: int = 2, *, dtype: torch.dtype = torch.float32, **options
) -> CoordinatewiseLSTM:
    torch.manual_seed(1)
    return CoordinatewiseLSTM(hidden, layers, dtype=dtype, **options)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Parameters of rank 1, 2 and 4, some of more than one block of state."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4)]
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 1, 8, 8, generator=generator).to(dtype)
    return x, torch.randint(4, (12,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x, labels = batch(seed, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), labels)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for seed in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    assert all(map(torch.equal, weights(first), weights(second)))


def lstm_cells(learned: CoordinatewiseLSTM) -> list[nn.LSTMCell]:
    """The same layers in torch's own modules."""
    cells = []
    flat = iter(learned.weights)
    for _ in range(learned.layers):
        weight_ih, weight_hh, bias = next(flat), next(flat), next(flat)
        module = nn.LSTMCell(weight_ih.shape[1], learned.hidden, dtype=weight_ih.dtype)
        with torch.no_grad():
            for target, value in zip(
                module.parameters(), (weight_ih, weight_hh, bias, 0 * bias), strict=True
            ):
                target.copy_(value)
        cells.append(module)
    return cells


@pytest.mark.parametrize(("preprocess", "layers"), [("log_sign", 2), ("none", 1), ("log_sign", 3)])
def test_the_module_is_torchs_lstm_cells_on_every_coordinate(preprocess: str, layers: int) -> None:
    learned = cell(6, layers, dtype=torch.float64, preprocess=preprocess, p=3.0, scale=0.5)
    grads = [torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(70, dtype=torch.float64)]
    state = learned.initial_state(grads)
    flat = torch.cat([grad.flatten() for grad in grads])
    hidden = [(flat.new_zeros(94, 6), flat.new_zeros(94, 6)) for _ in range(layers)]
    for _ in range(3):
        updates, state = learned(grads, state)
        x = reference.log_sign(flat, 3.0) if preprocess == "log_sign" else flat.unsqueeze(1)
        for index, module in enumerate(lstm_cells(learned)):
            hidden[index] = module(x, hidden[index])
            x = hidden[index][0]
        expected = 0.5 * (x @ learned.weight_out.T + learned.bias_out)[:, 0]
        torch.testing.assert_close(torch.cat([update.flatten() for update in updates]), expected)
    assert [update.shape for update in updates] == [grad.shape for grad in grads]


def test_the_unroll_is_as_many_steps_and_trains_the_weights() -> None:
    learned = cell(dtype=torch.float64)
    params = [torch.randn(3, 5, dtype=torch.float64)]
    grads = torch.randn(4, 3, 5, dtype=torch.float64)
    trajectory, state = learned.unroll([grads], learned.initial_state(params), params)
    moved, stepped = params, learned.initial_state(params)
    for step in range(4):
        moved, stepped = learned([grads[step]], stepped, moved)
        torch.testing.assert_close(trajectory[0][step], moved[0])
    torch.testing.assert_close(state, stepped)
    trajectory[0].sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in learned.parameters())


def test_truncated_backpropagation_by_hand_is_that_of_training() -> None:
    """The loop of the class's docstring, but that the weights stay until its end."""
    learned = cell(dtype=torch.float64)
    problems = QuadraticSampler(tasks=3, steps=6).batch(0)
    problems = type(problems)(
        [start.double() for start in problems.start], 6, problems.matrix.double(), problems.target.double()
    )
    LearnedOptimizer(learned, truncation=2).loss(problems).backward()
    expected = [weight.grad.clone() for weight in learned.weights]
    learned.zero_grad()

    params = problems.start
    state = learned.initial_state(params)
    for _ in range(3):
        params, state = [p.detach().requires_grad_() for p in params], state.detach()
        value, total = problems.objective(params).sum(), 0
        for _ in range(2):
            grads = torch.autograd.grad(value, params, retain_graph=True)
            params, state = learned(grads, state, params)
            value = problems.objective(params).sum()
            total = total + value
        (total / (6 * 3)).backward()
    torch.testing.assert_close([weight.grad for weight in learned.weights], expected)


def test_the_modules_state_dict() -> None:
    learned = cell()
    other = CoordinatewiseLSTM(5)
    other.load_state_dict(learned.state_dict())
    assert all(map(torch.equal, learned.weights, other.weights))
    assert [weight.dtype for weight in learned.double().weights] == [torch.float64] * 8
    assert repr(learned) == "CoordinatewiseLSTM(5, layers=2, preprocess='log_sign', p=10.0, scale=0.1)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 20}, "hidden: expected the weights of a cell with 20, got 5"),
        ({"layers": 1}, "layers: expected the weights of a cell with 1, got 2"),
        ({"layers": 3}, "layers: expected the weights of a cell with 3, got 2"),
        ({"preprocess": "none"}, "preprocess: expected the weights of a cell with 'none', got 'log_sign'"),
        ({"p": 5.0}, r"p: expected the weights of a cell with 5\.0, got 10\.0"),
        ({"scale": 1}, r"scale: expected the weights of a cell with 1, got 0\.1"),
    ],
)
def test_weights_of_another_cell_are_refused_in_one_line(options: dict, message: str) -> None:
    torch.manual_seed(2)
    other = CoordinatewiseLSTM(**{"hidden": 5, **options})
    before = [weight.clone() for weight in other.weights]
    for model, saved in ((other, cell()), (nn.ModuleDict({"cell": other}), nn.ModuleDict({"cell": cell()}))):
        with pytest.raises(RuntimeError, match=message) as error:
            model.load_state_dict(saved.state_dict())
        assert str(error.value).count("\n\t") == 1
    assert all(map(torch.equal, before, other.weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"layers": 0}, "layers: expected 1 to 3, got 0"),
        ({"layers": 4}, "layers: expected 1 to 3, got 4"),
        ({"layers": 9}, "layers: expected 1 to 3, got 9"),
        ({"preprocess": "log"}, "preprocess: expected one of"),
        ({"p": 0.0}, "p: expected a number > 0, at most 88, got 0.0"),
        ({"p": 100.0}, "p: expected a number > 0, at most 88, got 100.0"),
    ],
)
def test_a_cells_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM(**options)


def test_options_travel_with_the_weights() -> None:
    file = io.BytesIO()
    torch.save(cell(p=5.0, scale=0.3).half().state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(value, Tensor) for value in saved.values())  # as safetensors want them
    CoordinatewiseLSTM(5, p=5, scale=0.3).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"p: expected .*; scale: expected"):
        CoordinatewiseLSTM(5).load_state_dict(saved)
    del saved["_extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing key.* \"_extra_state\""):
        CoordinatewiseLSTM(5, p=5, scale=0.3).load_state_dict(saved)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints, whose cell differs from the default in its numbers."""
    pytest.importorskip("pydantic", reason="the command line needs metafast[cli]")
    pytest.importorskip("rich", reason="training needs metafast[cli]")
    pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
    from metafast.program.cli import main

    options = "--hidden 4 --layers 1 --p 3 --scale 0.2 --inner-steps 4 --truncation 2"
    loop = "--tasks 2 --steps 2 --checkpoint-every 1 --log-every 1"
    command = ["train", "l2l", "--task", "quadratic", *options.split(), *loop.split()]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_the_cell_of_a_run_trains_a_network(run: Path) -> None:
    from metafast.runs.checkpoint import Checkpoint, list_checkpoints

    loaded = CoordinatewiseLSTM.from_checkpoint(str(run))
    assert repr(loaded) == "CoordinatewiseLSTM(4, layers=1, preprocess='log_sign', p=3.0, scale=0.2)"
    first, last = list_checkpoints(run)
    for path, of_file in ((last, loaded), (first, CoordinatewiseLSTM.from_checkpoint(first))):
        saved = Checkpoint.read(path).tensors
        for name, weight in of_file.named_parameters():
            assert torch.equal(weight, saved[f"model.cell.{name}"])
    assert not torch.equal(loaded.weight_out, CoordinatewiseLSTM.from_checkpoint(first).weight_out)

    model = network()
    before = weights(model)
    steps(model, LSTMOptimizer(model.parameters(), loaded), 1)
    assert not any(map(torch.equal, before, weights(model)))


def test_a_checkpoint_of_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: expected a run that trains a MetaLSTM, got another"):
        metafast.MetaLSTM.from_checkpoint(run)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        CoordinatewiseLSTM.from_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_cells(dtype: torch.dtype) -> None:
    model, learned = network(dtype), cell(dtype=dtype)
    optimizer = LSTMOptimizer(model.parameters(), learned, lr=0.5)
    params = weights(model)
    state = learned.initial_state(params)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            updates, state = learned(grads, state)
        params = [param + 0.5 * update for param, update in zip(params, updates, strict=True)]
        optimizer.step()
        torch.testing.assert_close(weights(model), params)
    parts = [optimizer.state[parameter]["lstm"] for parameter in model.parameters()]
    torch.testing.assert_close(torch.cat(parts), state)


def test_a_group_takes_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = metafast.optim.lstm_optimizer.lstm_optimizer_step_

    def counted(params: list[Tensor], *arguments, **options) -> None:
        calls.append((len(params), options["scale"]))
        step(params, *arguments, **options)

    monkeypatch.setattr(metafast.optim.lstm_optimizer, "lstm_optimizer_step_", counted)
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    steps(model, LSTMOptimizer(groups, cell(scale=0.2)), 1)
    assert calls == [(2, 0.2), (2, 0.1)]


def test_learning_rate_of_zero_moves_the_state_alone() -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell(), lr=0.0)
    before = weights(model)
    steps(model, optimizer, 1)
    assert all(map(torch.equal, before, weights(model)))
    assert all(optimizer.state[parameter]["lstm"].abs().sum() > 0 for parameter in model.parameters())


def test_schedulers_and_hooks_work() -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(3):
        steps(model, optimizer, 1, first=seed)
        scheduler.step()
    assert seen == [1.0, 0.5, 0.25]


def test_closures() -> None:
    model, other = network(), network()
    optimizer = LSTMOptimizer(model.parameters(), cell())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    expected = loss_of(model).item()
    assert optimizer.step(closure).item() == expected
    steps(other, LSTMOptimizer(other.parameters(), cell()), 1)
    assert_equal(model, other)


def test_parameters_without_gradients_are_left_alone() -> None:
    """Whichever they are, the others' states go on as if they were alone."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size)) for size in (3, 130, 64, 1)]
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    together = LSTMOptimizer(params, cell())
    single = [LSTMOptimizer([param], cell()) for param in alone]
    for absent in ((), (1,), (1, 2), (0, 3), (0, 1, 2, 3), (), (3,), ()):
        for index, (param, copied) in enumerate(zip(params, alone, strict=True)):
            grad = None if index in absent else torch.randn_like(param)
            param.grad, copied.grad = grad, grad
        before = [param.detach().clone() for param in params]
        states = [
            together.state[param]["lstm"].clone() if together.state[param] else None for param in params
        ]
        together.step()
        for optimizer in single:
            optimizer.step()
        for index in absent:
            assert torch.equal(params[index], before[index])
            assert torch.equal(together.state[params[index]]["lstm"], states[index])
        for param, copied, optimizer in zip(params, alone, single, strict=True):
            torch.testing.assert_close(param, copied)
            torch.testing.assert_close(together.state[param]["lstm"], optimizer.state[copied]["lstm"])


def test_a_parameter_that_never_had_a_gradient_has_no_state() -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = LSTMOptimizer(model.parameters(), cell())
    steps(model, optimizer, 2)
    assert set(optimizer.state) == set(model[3].parameters())


@pytest.mark.parametrize("through", ["memory", "file", "file, names"])
def test_goes_on_from_a_state_dict_bit_for_bit(through: str) -> None:
    named = through.endswith("names")

    def optimizer_of(model: nn.Module) -> LSTMOptimizer:
        return LSTMOptimizer(model.named_parameters() if named else model.parameters(), cell(), lr=0.7)

    model = network()
    optimizer = optimizer_of(model)
    steps(model, optimizer, 3)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through == "memory":
        saved = copy.deepcopy(saved)
    else:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    steps(model, optimizer, 3, first=3)

    resumed = network()
    other = optimizer_of(resumed)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    steps(resumed, other, 3, first=3)
    assert_equal(model, resumed)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell())
    steps(model, optimizer, 2)
    twin, copied = copy.deepcopy((model, optimizer))
    steps(model, optimizer, 2, first=2)
    before = weights(model)
    steps(twin, copied, 2, first=2)
    assert_equal(model, twin)
    assert all(map(torch.equal, before, weights(model)))


def test_the_cell_is_read_and_not_changed() -> None:
    model, learned = network(), cell()
    before = [weight.detach().clone() for weight in learned.weights]
    steps(model, LSTMOptimizer(model.parameters(), learned), 2)
    assert all(map(torch.equal, before, learned.weights))
    assert all(weight.grad is None for weight in learned.parameters())


def test_bfloat16_state() -> None:
    half, single = network(), network()
    options = {"lr": 1.0, "state_dtype": torch.bfloat16}
    optimizer = LSTMOptimizer(half.parameters(), cell(), **options)
    steps(half, optimizer, 3)
    steps(single, LSTMOptimizer(single.parameters(), cell()), 3)
    assert {state["lstm"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    for ours, exact in zip(half.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-2, atol=2e-3)
    assert not torch.equal(half[3].weight, single[3].weight)

    resumed, other = copy.deepcopy(half), None
    other = LSTMOptimizer(resumed.parameters(), cell(), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {state["lstm"].dtype for state in other.state.values()} == {torch.bfloat16}
    steps(half, optimizer, 2, first=3)
    steps(resumed, other, 2, first=3)
    assert_equal(half, resumed)


def test_dtypes_may_be_mixed_and_groups_added() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(6, dtype=torch.float64))]
    optimizer = LSTMOptimizer(params, cell())
    added = nn.Parameter(torch.randn(7))
    optimizer.add_param_group({"params": [added], "lr": 2.0, "state_dtype": torch.bfloat16})
    every = [*params, added]
    before = [param.detach().clone() for param in every]
    for param in every:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert all(not torch.equal(param, old) for param, old in zip(every, before, strict=True))
    dtypes = [optimizer.state[param]["lstm"].dtype for param in every]
    assert dtypes == [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("named", [False, True])
def test_a_state_that_does_not_fit_names_its_parameter(named: bool) -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell())
    steps(model, optimizer, 1)
    saved = optimizer.state_dict()

    wider = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 7))
    other = LSTMOptimizer(wider.named_parameters() if named else wider.parameters(), cell())
    name = r"'2\.weight'" if named else "parameter 2 of its group"
    with pytest.raises(ValueError, match=rf"state of {name}: expected \(12, 20, 64\), .* got \(7, 20, 64\)"):
        other.load_state_dict(saved)
    assert not other.state

    other = LSTMOptimizer(network().parameters(), cell(8))
    with pytest.raises(ValueError, match=r"a cell of 2 layers of 8 units, got \(1, 20, 64\)"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(("before", "after"), [((2, 3), (4, 5)), ((2, 3), (3, 2)), ((6,), (2, 3))])
def test_a_state_of_as_many_blocks_but_another_shape_is_refused(before: tuple, after: tuple) -> None:
    param = nn.Parameter(torch.zeros(before))
    optimizer = LSTMOptimizer([param], cell())
    param.grad = torch.ones(before)
    optimizer.step()
    other = LSTMOptimizer([("weight", nn.Parameter(torch.zeros(after)))], cell())
    shapes = [re.escape(f"for shape {shape}") for shape in (after, before)]
    with pytest.raises(ValueError, match=rf"state of 'weight': expected .* {shapes[0]} .* {shapes[1]}"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("stepped", [False, True])
def test_another_optimizers_state_dict_is_refused(kind: Callable, stepped: bool) -> None:
    model = network()
    other = kind(model.parameters(), lr=0.1)
    steps(model, other, int(stepped))
    optimizer = LSTMOptimizer(model.parameters(), cell())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: expected .* lr, state_dtype .* got .* lr, "):
        optimizer.load_state_dict(other.state_dict())
    saved = {"state": other.state_dict()["state"], "param_groups": before["param_groups"]}
    if kind is torch.optim.Adam and stepped:
        with pytest.raises(
            ValueError, match="state of parameter 0 of its group: expected lstm and shape, got"
        ):
            optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before
    steps(model, optimizer, 1)


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "allowed"),
    [
        (torch.float32, torch.float64, "torch.float32 or torch.bfloat16 beside torch.float32"),
        (torch.float64, torch.float32, "torch.float64 beside torch.float64"),
        (torch.float64, torch.bfloat16, "torch.float64 beside torch.float64"),
    ],
)
def test_a_state_dtype_that_does_not_fit_its_parameters_is_refused(
    dtype: torch.dtype, state_dtype: torch.dtype, allowed: str
) -> None:
    learned, model = cell(), network(dtype)
    message = rf"state_dtype: expected {allowed}, got {state_dtype} \(parameter 0 of its group\)"
    with pytest.raises(TypeError, match=message):
        LSTMOptimizer(model.parameters(), learned, state_dtype=state_dtype)
    optimizer = LSTMOptimizer(model.parameters(), learned)
    added = {"params": [nn.Parameter(torch.zeros(1, dtype=dtype))], "state_dtype": state_dtype}
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group(added)
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = state_dtype
    with pytest.raises(TypeError, match=message):
        optimizer.load_state_dict(saved)
    steps(model, optimizer, 1)
    assert {state["lstm"].dtype for state in optimizer.state.values()} == {dtype}


def test_bad_arguments_are_named() -> None:
    model, learned = network(), cell()
    with pytest.raises(TypeError, match="cell: expected a CoordinatewiseLSTM, got Linear"):
        LSTMOptimizer(model.parameters(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="lr: expected a number >= 0, got -1"):
        LSTMOptimizer(model.parameters(), learned, lr=-1)
    with pytest.raises(TypeError, match=r"state_dtype: expected .* got torch\.float16"):
        LSTMOptimizer(model.parameters(), learned, state_dtype=torch.float16)
    with pytest.raises(
        TypeError, match=r"params: expected float32 or float64, got torch\.bfloat16 \(parameter 0"
    ):
        LSTMOptimizer(network(torch.bfloat16).parameters(), learned)
    optimizer = LSTMOptimizer(model.parameters(), learned)
    with pytest.raises(ValueError, match="lr: expected a number >= 0, got nan"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": float("nan")})
    assert len(optimizer.param_groups) == 1

    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = LSTMOptimizer(embedding.named_parameters(), learned)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"grad: expected a dense gradient, got torch\.sparse_coo \('weight'\)"
    ):
        optimizer.step()


def test_parameters_in_another_memory_layout() -> None:
    plain, channels_last = network(), network().to(memory_format=torch.channels_last)
    steps(plain, LSTMOptimizer(plain.parameters(), cell()), 3)
    steps(channels_last, LSTMOptimizer(channels_last.parameters(), cell()), 3)
    torch.testing.assert_close(weights(channels_last), weights(plain))
    assert channels_last[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_no_parameters_with_gradients_is_no_step() -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell())
    before = weights(model)
    optimizer.step()
    assert all(map(torch.equal, before, weights(model)))
    assert not optimizer.state


def test_a_state_dict_can_be_loaded_again_and_into_a_copy() -> None:
    param = nn.Parameter(torch.zeros(5))
    optimizer = LSTMOptimizer([param], CoordinatewiseLSTM(4, 1))
    param.grad = torch.ones(5)
    optimizer.step()
    best = optimizer.state_dict()
    for _ in range(2):
        optimizer.load_state_dict(best)
        optimizer.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy(LSTMOptimizer([param], optimizer.cell))
    copied.load_state_dict(best)
    assert torch.equal(*(o.state_dict()["state"][0]["lstm"] for o in (copied, optimizer)))


def test_states_of_parameters_that_stop_keep_no_memory_but_their_own() -> None:
    params = [nn.Parameter(torch.zeros(640)) for _ in range(6)]
    optimizer = LSTMOptimizer(params, CoordinatewiseLSTM(4, 1))
    for last in range(len(params), 0, -1):
        for index, param in enumerate(params):
            param.grad = torch.ones(640) if index < last else None
        optimizer.step()
    states = [optimizer.state[param]["lstm"] for param in params]
    held = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states}
    assert sum(held.values()) == sum(state.nbytes for state in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_capturable_step_reads_its_learning_rate_where_it_is(dtype: torch.dtype) -> None:
    (plain, plain_steps), (capturable, capturable_steps) = (
        (
            model,
            LSTMOptimizer(model.parameters(), cell(dtype=dtype), lr=lr, capturable=isinstance(lr, Tensor)),
        )
        for model, lr in ((network(dtype), 0.3), (network(dtype), torch.tensor(0.3)))
    )
    assert capturable_steps.param_groups[0]["capturable"]
    steps(plain, plain_steps, 2)
    steps(capturable, capturable_steps, 2)
    plain_steps.param_groups[0]["lr"] = 0.1
    capturable_steps.param_groups[0]["lr"].fill_(0.1)
    steps(plain, plain_steps, 1)
    steps(capturable, capturable_steps, 1)
    for one, other in zip(weights(capturable), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_state_dict_of_before_there_was_capturable() -> None:
    model = network()
    optimizer = LSTMOptimizer(model.parameters(), cell(), capturable=True)
    steps(model, optimizer, 1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["capturable"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["capturable"] is False
    steps(model, optimizer, 1)


@pytest.mark.gpu
def test_a_captured_step_is_the_plain_one() -> None:
    """Replays go on from the states as they are, with the learning rate as it is."""
    plain, captured = network().cuda(), network().cuda()
    lr = torch.tensor(0.3, device="cuda")
    optimizers = [
        LSTMOptimizer(plain.parameters(), cell().cuda(), lr=0.3),
        LSTMOptimizer(captured.parameters(), cell().cuda(), lr=lr, capturable=True),
    ]
    x, labels = (t.cuda() for t in batch())

    def step(model: nn.Module, optimizer: LSTMOptimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, optimizers[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1])
    for learning_rate in (0.3, 0.3, 0.1):
        lr.fill_(learning_rate)
        graph.replay()
    for learning_rate in (0.3, 0.3, 0.3, 0.1):
        optimizers[0].param_groups[0]["lr"] = learning_rate
        step(plain, optimizers[0])
    for one, other in zip(weights(captured), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("capturable", "message"), [(False, "capturable=True"), (True, "before the capture")]
)
def test_a_step_that_may_not_be_captured_says_so(capturable: bool, message: str) -> None:
    param = nn.Parameter(torch.zeros(3, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = LSTMOptimizer([param], cell().cuda(), capturable=capturable)
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
