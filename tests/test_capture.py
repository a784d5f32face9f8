"""Steps of training as a graph: they can be recorded, and repeated they are the steps as they are written.

Without a GPU `RecordedOps` stands in for CUDA's graphs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydantic", reason="settings need metafast[cli]")
pytest.importorskip("rich", reason="the training loop needs metafast[cli]")
pytest.importorskip("safetensors", reason="checkpoints need metafast[cli]")
pytest.importorskip("sklearn", reason="digits need metafast[digits]")

from parity import EVERY_ROW, cotangent, make, value_and_grads
from recorded_ops import RecordedOps
from rows import Row
from test_train import assert_same_run, records, run, spoiled, tensors

import metafast
from metafast import CoordinatewiseLSTM, LSTMOptimizer
from metafast.data import Episodes, SineSampler
from metafast.methods import MAML, METHODS, Method, mlp
from metafast.program import train as training
from metafast.program.capture import NotCapturable, _Watch
from metafast.program.config import compose, sources_of
from metafast.program.distributed import Ranks
from metafast.program.steps import graphs_for
from metafast.program.train import train
from metafast.reference import labels

GPU = pytest.param("cuda", marks=pytest.mark.gpu)

# The options of each method that change what a step computes.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "matching": [{"full_context": True}],
    "relation": [{"head": "linear"}],
    "imaginary": [{"learner": "matching"}, {"learner": "siamese"}],
    "maml": [
        {"backbone": "conv4", "channels": 4},
        {"backbone": "conv4", "channels": 4, "transductive": False},
        {"backbone": "resnet12", "channels": 2, "image_size": 16},
        {"inner_steps": 0, "learn_inner_lr": False},
    ],
    "metasgd": [{"backbone": "conv4", "channels": 4}],
    "reptile": [{"backbone": "conv4", "channels": 4, "inner_steps": 2}, {"inner_steps": 2, "inner_batch": 3}],
    "meta-lstm": [{"cell_layers": 0}, {"cell_layers": 2}],
    "protonet": [{"metric": "cosine"}, {"metric": "cityblock"}],
    "l2l": [{"random_scaling": 1.0, "objective": "log"}, {"preprocess": "none"}],
}
SMALL = {
    "images": {"ways": 3, "queries": 2},
    "gaussians": {"ways": 3, "queries": 2},
    "sine": {},
}


def _cases() -> Iterator[Any]:
    for name, learner in METHODS.items():
        for source, kind in ((source, data.kind) for source, data in sources_of(learner).items()):
            if source in ("omniglot", "a folder"):  # images, as digits
                continue
            small = {"inner_steps": 20} if learner.source == "task" else SMALL[kind]
            variants = VARIANTS.get(name, []) if source in ("digits", "quadratic") else []
            for variant in ({}, *variants):
                said = "-".join([name, source, *map(str, variant.values())])
                yield pytest.param(name, {learner.source: source, "tasks": 2, **small, **variant}, id=said)


EVERY_METHOD = pytest.mark.parametrize(("name", "given"), list(_cases()))


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where steps are recorded; on the CPU what looks at labels lets the device look, as on CUDA."""
    if request.param == "cpu":
        monkeypatch.setattr(labels, "_require", lambda checked, *_: checked)
    return torch.device(request.param)


def begun(name: str, given: dict[str, Any], device: torch.device) -> tuple[Any, Any, nn.Module]:
    """The configuration, the sampler and the method that options describe."""
    torch.manual_seed(0)
    config = compose(name, given)
    sampler = config.data.sampler("train", seed=0, device=device)
    method = config.learner.from_settings(config.settings, sampler.batch(0).problem)
    return config, sampler, method.to(device).train()


@EVERY_METHOD
def test_no_step_waits_for_the_device(name: str, given: dict[str, Any], device: torch.device) -> None:
    """Drawing its batch does not, even that of a new block, nor does it copy anything there."""
    _, sampler, method = begun(name, given, device)
    with _Watch(device):
        batch = sampler.batch(100)
        method.loss(batch).backward()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            method.loss(sampler.batch(200)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY_METHOD
def test_a_step_stays_on_its_device(name: str, given: dict[str, Any]) -> None:
    """And asks for no value: the device "meta" has none, and takes no tensor of the CPU beside its own."""
    config, _, method = begun(name, given, torch.device("cpu"))
    batch = config.data.sampler("train", seed=0, device="meta").batch(100)
    loss = method.to("meta").loss(batch)
    loss.backward()
    assert loss.device.type == "meta"


@pytest.mark.parametrize(
    ("waits", "message"),
    [
        (lambda x: x.sum().item(), "waits for the device .*_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "waits for the device"),
        (lambda x: x.nonzero(), "waits for the device .*nonzero"),
        (lambda x: x.unique(), "waits for the device .*unique"),
        (lambda x: x[x > 0], "indexes with a mask"),
        (lambda x: x.index_put((x > 0,), x.new_ones(())), "indexes with a mask"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), "numbers in Python"),
        (lambda x: torch.arange(3, device=x.device).repeat_interleave(torch.ones_like(x).long()), "waits"),
        pytest.param(lambda x: x.cpu(), "copies from cuda:0 to cpu", marks=pytest.mark.gpu),
        pytest.param(lambda x: torch.ones(3).to(x), "copies from cpu to cuda:0", marks=pytest.mark.gpu),
    ],
)
def test_what_waits_for_the_device_is_seen(waits: Callable[[Tensor], Any], message: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.ones(3, device=device)
    waits(x)
    with pytest.raises(NotCapturable, match=message), _Watch(device):
        waits(x)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedOps:
    """What records the steps of `train` on the CPU."""
    recorded = RecordedOps()
    monkeypatch.setattr(labels, "_require", lambda checked, *_: checked)
    monkeypatch.setattr(training, "graphs_for", lambda graph, *_: None if graph == "off" else recorded)
    return recorded


def trained(name: str, given: dict[str, Any], device: torch.device, graph: str) -> dict[str, Tensor]:
    """The weights after six steps, by the method's own optimizer and a schedule."""
    config, sampler, method = begun(name, {**given, "steps": 6, "schedule": "cosine"}, device)
    optimizer, scheduler = config.training.make_optimizer(method)
    train(
        method,
        sampler.batch,
        steps=6,
        optimizer=optimizer,
        scheduler=scheduler,
        result=lambda *_: ("none", 0.0),
        graph=graph,
    )
    return method.state_dict()


@EVERY_METHOD
def test_a_recorded_step_is_the_step_as_it_is_written(
    name: str, given: dict[str, Any], graphs: RecordedOps
) -> None:
    """The same weights, bit for bit."""
    expected, got = (trained(name, given, torch.device("cpu"), graph) for graph in ("off", "on"))
    assert (graphs.recorded, graphs.replayed) == (1, 2)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.gpu
@EVERY_METHOD
def test_a_cuda_graph_is_the_step_as_it_is_written(name: str, given: dict[str, Any]) -> None:
    """The same weights, bit for bit where torch's own operations have the same bits twice."""
    first, again, got = (trained(name, given, torch.device("cuda"), graph) for graph in ("off", "off", "on"))
    for key, value in first.items():
        noise = (again[key].double() - value.double()).abs().max()
        difference = (got[key].double() - value.double()).abs().max()
        assert difference <= 10 * noise, key


@pytest.mark.gpu
def test_a_graph_waits_for_the_device_where_it_looks_at_it_alone(tmp_path: Path) -> None:
    sampler = SineSampler(shots=5, queries=5, tasks=3, device="cuda")
    method = MAML(mlp(1, [8, 8], 1), loss="mse", lr=0.01, steps=2).cuda()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2, fused=True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            train(
                method,
                sampler.batch,
                steps=1000,
                optimizer=optimizer,
                log_every=1000,
                result=lambda *_: ("none", 0.0),
                graph="on",
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waited if "synchroniz" in str(one.message)]) <= 2 * 1000 // 100


@pytest.mark.parametrize("problem", ["images", "waves", "optimizees"])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_run_by_a_graph_is_the_plain_run(
    tmp_path: Path, problem: str, log_every: int, graphs: RecordedOps
) -> None:
    """Its log and its checkpoints, optimizer and random numbers included."""
    run(tmp_path / "plain", problem=problem, log_every=log_every)
    run(tmp_path / "graph", problem=problem, log_every=log_every, graph="on")
    assert graphs.replayed > 0
    assert_same_run(tmp_path / "plain", tmp_path / "graph")


@pytest.mark.parametrize("problem", ["images", "waves", "optimizees"])
@pytest.mark.parametrize(("first", "second"), [("on", "on"), ("on", "off"), ("off", "on")])
def test_a_run_resumes_bit_for_bit_with_a_graph_and_without(
    tmp_path: Path, problem: str, first: str, second: str, graphs: RecordedOps
) -> None:
    run(tmp_path / "whole", problem=problem)
    run(tmp_path / "parts", problem=problem, steps=5, graph=first)
    torch.rand(3)  # the generator's state must come out of the checkpoint
    run(tmp_path / "parts", problem=problem, resume=True, graph=second)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class Dropping(MAML):
    """Draws random numbers, and counts its losses in a buffer."""

    def __init__(self) -> None:
        super().__init__(mlp(1, [8], 1), loss="mse", lr=0.01, steps=3)
        self.register_buffer("count", torch.zeros(()))

    def loss(self, episodes: Episodes) -> Tensor:
        self.count += 1
        return super().loss(replace(episodes, support=nn.functional.dropout(episodes.support, 0.1)))


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize("at", [1, 6, 13])
def test_a_graph_goes_back_to_where_a_task_diverged(
    tmp_path: Path, value: float, at: int, graphs: RecordedOps
) -> None:
    """In the steps before the recording or after it; the others are recorded anew."""
    sampler = SineSampler(shots=5, queries=5, tasks=4)

    def batches(step: int) -> Episodes:
        return spoiled(sampler.batch(step), [0, 2], value) if step == at else sampler.batch(step)

    torch.manual_seed(0)
    weights = Dropping().state_dict()
    for graph in ("off", "on"):
        torch.manual_seed(1)
        method = Dropping()
        method.load_state_dict(weights)
        run(tmp_path / graph, steps=20, graph=graph, log_every=4, method=(method, batches))
    assert records(tmp_path / "on")[at // 4] == {"step": at + 1, "diverged": 2}
    assert graphs.recorded == 1 + (at >= 4)
    assert_same_run(tmp_path / "off", tmp_path / "on")


class Asking(MAML):
    """Its loss is a number to Python."""

    def loss(self, episodes: Episodes) -> Tensor:
        value = super().loss(episodes)
        return value * (1 if float(value.detach()) > 0 else 2)


def changing(step: int) -> Episodes:
    """One task more in a later step."""
    return SineSampler(shots=5, queries=5, tasks=2 + (step == 5)).batch(step)


def asking() -> tuple[Method, Callable[[int], Episodes]]:
    method = Asking(mlp(1, [8], 1), loss="mse", lr=0.01, steps=1)
    return method, SineSampler(shots=2, queries=2, tasks=2).batch


def shapes() -> tuple[Method, Callable[[int], Episodes]]:
    return Dropping(), changing


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (asking, "it waits for the device (torch's _local_scalar_dense)"),
        (
            shapes,
            "batch.support was [2, 5, 1] of torch.float32 at first, and now is [3, 5, 1] of torch.float32",
        ),
    ],
)
def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(
    tmp_path: Path,
    make: Callable[[], tuple[Method, Callable[[int], Episodes]]],
    why: str,
    graphs: RecordedOps,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for graph in ("off", "auto"):
        torch.manual_seed(0)
        run(tmp_path / graph, graph=graph, log_every=4, method=make())
    assert_same_run(tmp_path / "off", tmp_path / "auto")
    assert capsys.readouterr().err.count(f"without a CUDA graph, as a step cannot be captured: {why}") == 1
    expected = f"graph: expected auto or off for a step that cannot be captured: {why}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        run(tmp_path / "on", graph="on", log_every=4, method=make())


def test_a_signal_ends_a_run_between_two_looks_at_the_device(tmp_path: Path, graphs: RecordedOps) -> None:
    drawn = []
    sampler = SineSampler(shots=5, queries=5, tasks=2)

    def batches(step: int) -> Episodes:
        drawn.append(step)
        return sampler.batch(step)

    arguments = {"log_every": 50, "method": (Dropping(), batches), "graph": "on"}
    run(tmp_path, steps=1000, stop=lambda: len(drawn) >= 7, **arguments)
    assert drawn == list(range(7))
    assert tensors(tmp_path)["model.count"] == 7


def test_where_there_are_no_graphs() -> None:
    told: list[str] = []
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    several = Ranks()
    several.size = 2
    assert graphs_for("off", cuda, several, told.append) is None
    assert graphs_for("auto", cpu, Ranks(), told.append) is None
    assert not told
    assert graphs_for("auto", cuda, several, told.append) is None
    assert told == ["without a CUDA graph, which there is none of with several ranks"]
    with pytest.raises(ValueError, match="graph: expected auto or off on the CPU, got on"):
        graphs_for("on", cpu, Ranks(), told.append)
    with pytest.raises(ValueError, match="graph: expected auto or off with several ranks, got on"):
        graphs_for("on", cuda, several, told.append)


@EVERY_ROW
def test_no_operation_waits_for_the_device(row: Row, device: torch.device) -> None:
    args = make(row, dtype=torch.float32, device=device)
    grad = cotangent(row.call(metafast)(*args))
    with _Watch(device):
        value_and_grads(row, row.call(metafast), args, grad)


def lstm_optimizer(module: nn.Module) -> LSTMOptimizer:
    lr = torch.tensor(0.3)  # read where it is at every replay
    return LSTMOptimizer(module.parameters(), CoordinatewiseLSTM(5), lr=lr, capturable=True)


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=1e-2, fused=True)


def plain_loss(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x[:, :4].flatten(0, 1)), labels[:, :4].flatten())


def adapted_loss(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    adapted = metafast.adapt(module, x[:, :4], labels[:, :4], loss="cross_entropy", lr=0.1, steps=2)
    return nn.functional.cross_entropy(adapted(x[:, 4:]).flatten(0, 1), labels[:, 4:].flatten())


@pytest.mark.parametrize("loss", [plain_loss, adapted_loss], ids=["plain", "adapt"])
@pytest.mark.parametrize("make_optimizer", [adam, lstm_optimizer], ids=["adam", "lstm"])
def test_a_loop_of_ones_own_can_be_recorded(
    loss: Callable[..., Tensor], make_optimizer: Callable[[nn.Module], Any], graphs: RecordedOps
) -> None:
    """With batches and a learning rate that change where they lie; batch norm's statistics go on as well."""

    def weights(recorded: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 3)
        )
        optimizer = make_optimizer(module)
        x, labels = torch.empty(2, 8, 1, 8, 8), torch.empty(2, 8, dtype=torch.int64)

        def step() -> None:
            optimizer.zero_grad()
            loss(module, x, labels).backward()
            optimizer.step()

        take = step
        for number in range(5):
            x.copy_(torch.rand(x.shape))
            labels.copy_(torch.arange(8).roll(number) % 3)
            if isinstance(optimizer.param_groups[0]["lr"], Tensor):
                optimizer.param_groups[0]["lr"].fill_(0.3 / (1 + number))
            if recorded and number == 1:  # after the first, which makes the optimizer's state
                take = graphs.record(step)
            take()
        return module.state_dict()

    expected, got = weights(False), weights(True)
    assert graphs.replayed == 3
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
