"""The benchmarks' frame: what is wrong is not timed, what fails is reported, what is measured is written."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench
from bench.common.budget import Budget
from bench.common.cases import Case, Skip, Variant
from bench.common.clock import Plan
from bench.common.report import Report
from bench.common.run import Family, run

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
    budget, shares = Budget(100.0, 3), []
    for _ in range(3):
        shares.append(budget.share().left())
        now += shares[-1]
    assert shares == pytest.approx([50, 100 / 3, 50 / 3])
    assert Budget(None, 1).share().left() == float("inf")


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
