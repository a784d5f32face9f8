"""The CUDA kernels of convolutional networks, each on its own, on the emulator against plain loops in double.

tests/cuda_emulator/convolutional.cpp has the loops. What the ops' own tests do not come by is here: TF32 and
bfloat16, every size of tile, pixels that are nobody's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest
from background import Job

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
TOLERANCE = {"float": 1e-5, "double": 1e-13}
ROUNDINGS = ("none", "tf32", "bfloat16", "pairs")  # csrc/convolutional/params.h
SEEDS = range(2)


def _build() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    path = Path(mkdtemp()) / "convolutional.so"
    sources = [EMULATOR / "emulator.cpp", EMULATOR / "convolutional.cpp", ROOT / "csrc/convolutional/cuda.cu"]
    common = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler, *common, f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-x", "c++", *sources]
    subprocess.run([*map(str, command), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


library = Job(_build, minutes=0.5)
pytestmark = pytest.mark.needs(library)


def error(kernel: str, dtype: str, *numbers: int) -> float:
    """The largest error over several schedules, which all have to give the same."""
    function = getattr(library.result(), f"{kernel}_error_{dtype}")
    function.restype = ctypes.c_double
    errors = set()
    for seed in SEEDS:
        library.result().metafast_emulator_set_seed(ctypes.c_uint64(seed))
        errors.add(function((ctypes.c_int64 * len(numbers))(*numbers)))
    assert len(errors) == 1
    return errors.pop()


class Convolution(NamedTuple):
    """A case of convolve_error and weights_error; `pixel`: numbers of a pixel of the source."""

    tasks: int
    images: int
    height: int
    width: int
    pitch: int
    taps: tuple[int, int]
    depth: int
    pixel: int
    stride: int = 1
    factors: int = 1
    backwards: bool = False
    shared_weights: bool = False
    bias: bool = True
    adds: bool = False

    def error(self, kernel: str, dtype: str, rounding: str = "none") -> float:
        sizes = (self.tasks, self.images, self.height, self.width, self.pitch, *self.taps, self.depth)
        flags = (self.backwards, self.shared_weights, self.bias, self.adds, ROUNDINGS.index(rounding))
        return error(kernel, dtype, *sizes, self.pixel, self.stride, self.factors, *flags)


CONVOLUTIONS = {
    "rows as taps": Convolution(3, 2, 5, 7, 64, (3, 1), 48, 16),
    "two factors": Convolution(2, 3, 6, 5, 64, (3, 3), 16, 16, factors=2),
    "strided, from the last tap on": Convolution(
        *(1, 2, 5, 5, 64, (3, 3), 16, 16),
        **{"stride": 2, "factors": 2, "backwards": True, "shared_weights": True, "bias": False, "adds": True},
    ),
    "odd depth": Convolution(2, 3, 5, 5, 16, (3, 3), 5, 16, factors=2),
    "grey images": Convolution(3, 2, 9, 9, 80, (3, 1), 3, 1),
    "colours": Convolution(2, 2, 9, 9, 48, (3, 1), 9, 3, factors=2, shared_weights=True),
    "linear": Convolution(3, 25, 1, 1, 16, (1, 1), 64, 64, factors=2),
    "no taps": Convolution(2, 2, 3, 3, 64, (0, 1), 16, 16),
    "many pixels": Convolution(4, 50, 14, 14, 64, (1, 1), 16, 16),
    "large kernel": Convolution(1, 1, 1, 1, 32, (5, 5), 16, 16, backwards=True, bias=False),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["convolve", "weights"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_convolutions(case: Convolution, kernel: str, dtype: str) -> None:
    assert case.error(kernel, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["convolve", "weights"])
def test_convolutions_in_tf32(case: Convolution, kernel: str) -> None:
    rounded = case.error(kernel, "float", "tf32")
    assert rounded < 1e-3
    if case.depth % 16 == 0 and case.taps[0] > 0:  # others stay in float32
        assert rounded > TOLERANCE["float"]


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kernel", ["convolve", "weights"])
def test_convolutions_in_bfloat16_are_those_of_rounded_factors(case: Convolution, kernel: str) -> None:
    assert case.error(kernel, "float", "bfloat16") < TOLERANCE["float"]


PAIRED = {
    "rows as taps": CONVOLUTIONS["rows as taps"]._replace(depth=96, pixel=32),
    "linear": CONVOLUTIONS["linear"],
    "wide": CONVOLUTIONS["two factors"]._replace(pitch=96, depth=32, pixel=32),
    **{
        name: CONVOLUTIONS[name]._replace(depth=32, pixel=32)
        for name in ("two factors", "strided, from the last tap on", "many pixels", "large kernel")
    },
}


@pytest.mark.parametrize("case", PAIRED.values(), ids=PAIRED)
@pytest.mark.parametrize("kernel", ["convolve", "weights"])
def test_convolutions_of_pairs(case: Convolution, kernel: str) -> None:
    assert case.error(kernel, "float", "pairs") < TOLERANCE["float"]


class Block(NamedTuple):
    """A case of block_error. values: 0 any, 1 with ties, 2 far from 0, 3 one channel constant, 4 with NaN."""

    size: tuple[int, int, int, int, int]  # tasks, images, height, width, channels
    norm: bool = True
    affine: bool = True
    affine_tangent: bool = True
    activation: str = "relu"
    pool: tuple[str, int, int, int, int, int, int] = ("max", 2, 2, 2, 2, 0, 0)  # kernel, stride, padding
    pools_first: bool = False
    values: int = 0

    def error(self, dtype: str) -> float:
        activation = ("none", "relu", "tanh").index(self.activation)
        pool, *window = self.pool
        kinds = (activation, ("none", "max", "average").index(pool), self.pools_first)
        norm = (self.norm, self.affine, self.affine_tangent)
        return error("block", dtype, *self.size, *norm, *kinds, *window, self.values)


POOLS = {
    "none": ("none", 1, 1, 1, 1, 0, 0),
    "max 2": ("max", 2, 2, 2, 2, 0, 0),
    "max 3, overlapping": ("max", 3, 3, 2, 2, 1, 1),
    "max, along one way": ("max", 2, 3, 3, 1, 0, 1),
    "max, padded": ("max", 2, 2, 3, 3, 1, 1),
    "max, pixels between": ("max", 1, 1, 2, 2, 0, 0),
    "average 2": ("average", 2, 2, 2, 2, 0, 0),
    "average, overlapping": ("average", 3, 2, 2, 1, 1, 0),
    "average of all": ("average", 5, 4, 5, 4, 0, 0),
}
SIZES = ((1, 1, 5, 4, 5), (3, 2, 5, 7, 16), (1, 2, 9, 8, 70), (2, 12, 5, 5, 33))


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_blocks(pool: tuple, activation: str, dtype: str) -> None:
    for i, size in enumerate(SIZES):
        case = Block(size, activation=activation, pool=pool, pools_first=i % 2 == 1)
        assert case.error(dtype) < TOLERANCE[dtype] * 2
        bare = case._replace(norm=False, affine=False, pools_first=not case.pools_first)
        assert bare.error(dtype) < TOLERANCE[dtype]
        assert bare._replace(values=1).error(dtype) < TOLERANCE[dtype]
        if activation != "tanh":  # which is NaN where NaN gets no gradient, or not
            assert bare._replace(values=4).error(dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms(dtype: str) -> None:
    size = (2, 12, 5, 5, 33)
    assert Block(size, affine=False).error(dtype) < TOLERANCE[dtype]
    assert Block(size, affine_tangent=False, activation="tanh").error(dtype) < TOLERANCE[dtype]
    # A constant channel's variance is 0, and what its n is multiplied with 1 / sqrt(eps).
    assert Block(size, values=3).error(dtype) < TOLERANCE[dtype] * 10
    # Numbers have 2^-24 of the mean, a thousand deviations, so n has a thousand times that.
    assert Block(size, values=2, activation="none").error(dtype) < TOLERANCE[dtype] * 100


PERMUTATIONS = {
    "rows and columns": ((2, 3, 4, 40, 35), (0, 1, 4, 2, 3), 48),
    "few channels": ((1, 2, 3, 5, 3), (0, 1, 3, 4, 2), 3),
    "one of all": ((2, 1, 9, 1, 20), (0, 1, 4, 3, 2), 32),
    "as it is": ((4, 1, 1, 33, 64), (0, 1, 2, 3, 4), 64),
    "from behind": ((1, 1, 64, 2, 20), (4, 3, 2, 1, 0), 20),
    "padded": ((1, 1, 1, 1, 7), (0, 1, 2, 3, 4), 16),
}


@pytest.mark.parametrize(("size", "order", "pad"), PERMUTATIONS.values(), ids=PERMUTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_permutations(size: tuple[int, ...], order: tuple[int, ...], pad: int, dtype: str) -> None:
    assert error("permute", dtype, *size, *order, pad) == 0
