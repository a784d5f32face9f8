"""The kernels of every instruction set that this machine has: other tests run those of the best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metafast import _C

ROOT = Path(__file__).parent.parent
# All ops and dtypes, odd sizes, none at all, first and second derivatives; and the op in place.
PARITY = "test_in_place or ((test_parity or test_sizes or test_second_order_parity) and cpu)"


BUILT = _C.build_info()["isas"]  # worst first
OTHERS = [isa for isa in BUILT[: BUILT.index(_C.detected_isa()) + 1] if isa != _C.active_isa()]


@pytest.mark.parametrize("isa", OTHERS)
def test_parity(isa: str) -> None:
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*pytest_again, "tests/test_contract.py", "tests/test_in_place.py", "-k", PARITY],
        cwd=ROOT,
        env={**os.environ, "METAFAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
