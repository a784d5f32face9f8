"""The kernels' vector functions: accuracy, special values, sums, parts of a vector."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from metafast import _C

ROOT = Path(__file__).parent.parent
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
ISAS = list(FLAGS)[: list(FLAGS).index(_C.detected_isa()) + 1]  # those that this machine runs
ULP = {"exp": 2.0, "log": 2.0, "log1p": 2.5, "tanh": 2.0}  # what common/simd.h promises
ABSOLUTE = {"lstm_tanh": 4e-7, "lstm_sigmoid": 2e-7}  # what learned_optimizer/nonlinear.h promises


@pytest.mark.parametrize("isa", ISAS)
def test_vector_functions(isa: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    assert compiler, "the extension was built with a C++ compiler, so there is one"
    program = tmp_path / "accuracy"
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-ffp-contract=fast", *FLAGS[isa], f"-DMETAFAST_ISA={isa}",
         f"-I{ROOT / 'csrc'}", str(ROOT / "tests/simd/accuracy.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")
    measured = {name: float(value) for name, value in (line.split() for line in lines if line)}
    for name, bound in ULP.items():
        assert measured[name] <= bound, f"{name}: {measured[name]} ulp"
    for name, bound in ABSOLUTE.items():
        assert measured[name] <= bound, f"{name}: {measured[name]}"
    assert measured["saturates"] == measured["specials"] == measured["sums"] == measured["parts"] == 1
