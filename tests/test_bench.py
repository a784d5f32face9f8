"""The benchmarks' frame: what is wrong is not timed, what fails is reported, what is measured is written."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from recorded_ops import RecordedOps

import bench
from bench.common.budget import Budget
from bench.common.cases import Case, Row, Skip, Target, Variant, judge, table, wrong_by
from bench.common.clock import Plan
from bench.common.machine import Peak
from bench.common.report import Report
from bench.common.run import Family, run
from bench.networks import cases as networks
from bench.networks import five_shot
from bench.networks.peers import pytorch
from bench.networks.workloads import NETWORKS, Problem

RIGHT = torch.tensor([1.0, 2.0])
PLAN = Plan(sample_s=1e-4, variant_s=1e-3, max_rounds=3)


def variant(name: str, result: object, kind: str = "eager") -> Variant:
    def build() -> Callable[[], torch.Tensor]:
        if isinstance(result, BaseException):
            raise result
        return lambda: result

    return Variant(name, kind, build, lambda found: [found])


def case(*others: Variant, ours: object = RIGHT) -> Callable[[], Case]:
    variants = [variant("metafast", ours, "metafast"), *others]
    return lambda: Case("case", variants, 1e6, 1e6, lambda _: [RIGHT.double()])


def measured(
    tmp_path: Path, *cases: Callable[[], Case], seconds: float | None = None
) -> tuple[dict, list[str]]:
    """The JSON file, and what failed."""
    options = argparse.Namespace(
        device=torch.device("cpu"),
        threads=torch.get_num_threads(),
        quick=True,
        only="",
        seconds=seconds,
        memory=1.0,
        out=tmp_path / "out.json",
    )
    named = [(f"case {i}", build) for i, build in enumerate(cases)]
    with Report("family", options) as report:
        failed = run(Family("family", "", lambda *_: iter(named), PLAN), options, report)
    return json.loads(options.out.read_text()), failed


def test_a_variant_is_timed_where_it_is_right(tmp_path: Path) -> None:
    found, failed = measured(
        tmp_path,
        case(
            variant("rounded", RIGHT * (1 + 3e-4)),
            variant("wrong", RIGHT * 1.01),
            variant("missing", Skip("not installed")),
            variant("broken", TypeError("no such argument")),
        ),
    )
    rows = {row["variant"]: row for row in found["results"][0]["variants"]}
    assert rows["metafast"]["error"] == 0
    assert rows["metafast"]["milliseconds"] > 0
    assert rows["rounded"]["error"] == pytest.approx(3e-4, rel=1e-2)
    assert rows["rounded"]["milliseconds"] > 0
    assert rows["wrong"]["skipped"] == "wrong by 1.0e-02, not timed"
    assert rows["missing"]["skipped"] == "not installed"
    assert rows["broken"]["skipped"] == "raised TypeError: no such argument"
    assert not failed
    assert "rounded" in (tmp_path / "out.txt").read_text()


def test_what_fails_of_metafast_fails_the_run_and_leaves_the_other_cases(tmp_path: Path) -> None:
    def no_case() -> Case:
        raise RuntimeError("no memory")

    found, failed = measured(tmp_path, case(ours=RIGHT * 1.001), no_case, case(variant("other", RIGHT)))
    assert [line.split(":")[0] for line in failed] == ["case 0", "case 1"]
    assert "wrong by 1.0e-03" in failed[0]
    assert len(found["results"]) == 2
    assert found["machine"]["complete"]


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path: Path) -> None:
    def ends() -> Case:
        raise SystemExit(143)  # as stop_at_sigterm has it

    with pytest.raises(SystemExit):
        measured(tmp_path, case(), ends, case())
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["results"]) == 1
    assert not found["machine"]["complete"]


def test_no_case_begins_when_the_time_is_up(tmp_path: Path) -> None:
    since_start = time.perf_counter() - bench.STARTED
    found, _ = measured(tmp_path, case(), case(), seconds=since_start)
    assert found["results"] == []
    assert (tmp_path / "out.txt").read_text().count("no time left") == 2


def test_a_budget_gives_the_first_most_and_the_last_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr("bench.common.budget.STARTED", 0.0)
    budget, shares = Budget(100.0, [1, 1, 1]), []
    for _ in range(3):
        shares.append(budget.share().left())
        now += shares[-1]
    assert shares == pytest.approx([50, 100 / 3, 50 / 3])
    assert Budget(None, [1]).share().left() == float("inf")
    now = 0.0
    assert Budget(100.0, [8, 1, 1]).share().left() == pytest.approx(100 * 2 * 8 / (10 + 8))


def test_methods_run_by_the_reference_in_the_place_of_the_operations() -> None:
    pytest.importorskip("pydantic", reason="runs need metafast[cli]")
    pytest.importorskip("rich", reason="runs need metafast[cli]")
    pytest.importorskip("safetensors", reason="runs need metafast[cli]")
    from bench.methods import gradient, in_reference
    from metafast.data import GaussianSampler
    from metafast.methods import ProtoNet, protonet

    method = ProtoNet(torch.nn.Linear(8, 3))
    episodes = GaussianSampler(ways=3, shots=2, queries=2, tasks=2, features=8).batch(0)
    fused, operation, used = gradient(method, episodes), protonet.prototypical_loss, []
    with in_reference(used.append):
        torch.testing.assert_close(gradient(method, episodes), fused)
    assert used == ["prototypical_loss"]
    assert protonet.prototypical_loss is operation


def test_every_folder_is_a_family_with_cases_for_both_devices() -> None:
    folders = {path.parent.name for path in Path(bench.__file__).parent.glob("*/__main__.py")}
    assert folders | {"overhead", "training"} == set(bench.FAMILIES)
    for name in folders:
        cases = importlib.import_module(f"bench.{name}.cases").cases
        for device in ("cpu", "cuda"):
            names = [case for case, _ in cases(torch.device(device), False)]
            assert len(names) == len(set(names)) > 0


# --- the 5-shot meta-step in three precisions --------------------------------------------------------------


def in_recorded_ops(call: Callable[[], object], changes: Sequence[torch.Tensor]) -> Callable[[], None]:
    """In the place of `graphed` on the CPU."""
    ops, before = RecordedOps(), [tensor.clone() for tensor in changes]
    ops.warm_up(call)
    replay = ops.record(call)
    replay()  # what the recording did
    torch._foreach_copy_(changes, before)
    return replay


def test_a_gpu_measures_five_shots_first_and_a_cpu_not_at_all() -> None:
    on_gpu, on_cpu = (
        [name for name, _ in networks.cases(torch.device(device), False)] for device in ("cuda", "cpu")
    )
    asked = [
        f"Conv4-64, T={tasks}, K=5, 5-shot, {precision}"
        for tasks in (32, 4)
        for precision in ("float32", "TF32", "bfloat16")
    ]
    assert on_gpu == asked + on_cpu
    weights = [five_shot.weight(name) for name in on_gpu]
    assert weights[:6] == [60, 25, 25, 15, 15, 15]
    assert set(weights[6:]) == {0.3}


def test_five_shots_in_three_precisions(tmp_path: Path) -> None:
    """On the CPU, which has no TF32, and where autocast leaves metafast's kernels in float32."""
    network, device = NETWORKS[1], torch.device("cpu")
    builds = [
        functools.partial(five_shot.case, precision.name, network, 1, 1, precision, device)
        for precision in five_shot.PRECISIONS
    ]
    found, failed = measured(tmp_path, *builds)
    assert not failed
    for result, precision in zip(found["results"], five_shot.PRECISIONS, strict=True):
        rows = {row["variant"]: row for row in result["variants"]}
        timed = {"metafast", 'metafast, path="torch.func"', "plain loop"}
        assert timed <= {name for name, row in rows.items() if row["milliseconds"]}
        assert "plain loop, CUDA graph" not in rows
        assert all(row["peak_bytes"] is None for row in rows.values())
        assert (rows["plain loop"]["error"] > 0.01) == precision.autocast
        assert not any("GiB" in verdict["target"] for verdict in result["targets"])


@pytest.mark.parametrize("precision", five_shot.PRECISIONS, ids=lambda precision: precision.name)
def test_the_loop_in_a_graph_is_the_loop(
    precision: five_shot.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "graphed", in_recorded_ops)
    problem = Problem(NETWORKS[1], 3, 2, torch.device("cpu"), five_shot.SHOTS)
    under = functools.partial(precision.under, torch.device("cpu"))
    expected = under(pytorch.loop(problem))()
    in_a_graph = pytorch.loop_graphed(problem, under)
    # The loop's tasks share a copy of the weights in bfloat16, and add up their gradients in its 8 bits, in
    # an order that the number of threads changes. A step more or less, or first order alone, is 0.3 and more.
    allowed = 0.1 if precision.autocast else 1e-5
    for _ in range(2):  # the same again
        assert wrong_by(in_a_graph(), [right.double() for right in expected]) < allowed


def test_precisions_leave_torch_as_it_was() -> None:
    def settings() -> tuple[object, ...]:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        return (
            matmul.fp32_precision == "tf32",
            conv.fp32_precision == "tf32",
            torch.is_autocast_enabled("cpu"),
        )

    before, seen = settings(), []
    for precision in five_shot.PRECISIONS:
        precision.under(torch.device("cpu"), lambda: seen.append(settings()))()
        assert settings() == before
    assert seen == [(False, False, False), (True, True, False), (False, False, True)]


def test_a_target_of_memory_is_judged_where_it_was_measured() -> None:
    row = Row("metafast", "metafast", error=0.0, milliseconds=1.0, best_milliseconds=1.0, times_floor=1.0)
    target = Target(gib=1.5)
    of_case = Case("case", [], 1, 1, lambda _: [], [target])
    assert judge(of_case, [row]) == []
    for peak, met in ((2**30, True), (2**31, False)):
        row.peak_bytes = peak
        (verdict,) = judge(of_case, [row])
        assert (verdict["target"], verdict["met"]) == ("at most 1.5 GiB", met)
        assert f"{peak / 2**30:g}" in table(of_case, [row], [verdict], Peak(1e9, 1e9, None))
