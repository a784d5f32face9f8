"""The compiled module: what it was built for, what it chooses at import, and what it must not carry along."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metafast
from metafast import _C, _built
from metafast._dispatch import load

ROOT = Path(__file__).parents[1]
ISAS = ("baseline", "avx2", "avx512")  # worst first


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_the_instruction_set(isa: str) -> None:
    if ISAS.index(isa) > ISAS.index(_C.detected_isa()):
        pytest.skip(f"this machine has no {isa}")
    result = run_python("import metafast; print(metafast.info().cpu_isa)", METAFAST_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


@pytest.mark.parametrize("value", ["sse9", "", "AVX2"])
def test_unknown_instruction_set_fails_the_import(value: str) -> None:
    result = run_python("import metafast", METAFAST_CPU_ISA=value)
    assert result.returncode != 0
    available = ", ".join(ISAS[: ISAS.index(_C.detected_isa()) + 1])
    assert "ImportError: METAFAST_CPU_ISA: expected one" in result.stderr
    assert f"({available}), got '{value}'" in result.stderr


@pytest.mark.parametrize(("name", "value"), [("TORCH", "2.4.1"), ("TORCH_CUDA", "11.8")])
def test_another_torch_than_built_against_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(_built, name, value)
    with pytest.raises(ImportError, match=f"{re.escape(value)}.*--no-build-isolation"):
        load._check_torch()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    result = run_python(
        "import torch, metafast\n"
        "x = torch.randn(256, 20, 64)\n"
        "metafast.pairwise_distance(x, x)\n"
        "torch.exp(torch.randn(1000, 1000))\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if '/lib' in line})"
    )
    assert result.returncode == 0, result.stderr
    runtimes = [path for path in result.stdout.split() if re.match(r"lib(gomp|iomp|omp)", Path(path).name)]
    assert len(runtimes) == 1, runtimes


def test_info_tells_what_runs_where() -> None:
    info = metafast.info()
    assert info.metafast == metafast.__version__
    assert info.torch == torch.__version__
    assert info.cpu_isa == _C.active_isa()
    assert info.cpu_isa in info.cpu_isas_built
    assert info.threads == torch.get_num_threads()
    assert (info.cuda is None) == (info.cuda_architectures is None)
    assert len(info.gpus) == torch.cuda.device_count()
    assert "cpu" in info.ops["pairwise"]
    assert ("cuda" in info.ops["pairwise"]) == (info.cuda is not None)
    table = str(info)
    for expected in (info.metafast, info.torch, info.cpu_isa, "pairwise", *info.gpus):
        assert expected in table


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="asks for CUDA kernels against a CPU build of torch"
)
def test_cuda_on_with_a_cpu_torch_fails_to_configure(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None, "the build requirements include cmake"
    command = [
        cmake,
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DMETAFAST_CUDA=ON",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    message = " ".join(result.stderr.split())
    assert result.returncode != 0
    assert f"METAFAST_CUDA=ON, but torch {torch.__version__}" in message
    assert "Install a CUDA build of torch" in message
    assert "METAFAST_CUDA=OFF" in message


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_library_looks_for_torch_beside_itself_only() -> None:
    command = ["readelf", "--dynamic", "--wide", _C.__file__]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    search_paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert search_paths == ["$ORIGIN/../torch/lib"]
    assert libraries
    assert not [name for name in libraries if "/" in name]


@pytest.mark.skipif(_C.build_info()["cuda"] is not None, reason="nvcc's line information holds full paths")
def test_library_names_no_folder_of_the_machine_that_built_it() -> None:
    content = Path(_C.__file__).read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert f"{folder}/".encode() not in content


def test_families_share_no_name_of_a_type() -> None:
    """Two types of one name in one namespace, and the linker keeps the functions of one of them for both."""
    folders: dict[str, set[str]] = {}
    for path in (ROOT / "csrc").glob("*/*"):
        namespaces: list[str] = []
        for line in path.read_text().splitlines():
            if opened := re.match(r"namespace ([\w:]*) *{", line):
                namespaces.append(opened[1])
            elif line.startswith("}  // namespace"):
                namespaces.pop()
            elif (found := re.match(r"(?:class|struct|enum class) (\w+)\b(?! *<|;)", line)) and all(
                namespaces
            ):
                folders.setdefault("::".join([*namespaces, found[1]]), set()).add(path.parent.name)
    assert "metafast::METAFAST_ISA::Network" in folders
    assert {name: where for name, where in folders.items() if len(where) > 1} == {}
