"""The package's layers: a module imports from its own and from those below, never from those above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "metafast"

# From the ground up. A folder beside another on one floor does not know it.
FLOORS = (
    {"_C", "_built"},  # compiled, and what the build wrote
    {"reference", "runs", "settings"},
    {"_dispatch"},
    {"ops"},
    {"adaptation", "optim"},
    {"data"},
    {"methods"},
    {"program"},
    {"__main__"},
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_built.py")


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within functions, by its full name."""
    package = ["metafast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":  # the roof: it shows a user what the floors below the methods have
        return
    own = folder_of(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package != "metafast":
            continue
        if not rest or rest[0] not in FLOOR:  # the package itself, as a user imports it
            assert own == "program", f"{name}: only the program uses the package as a user does"
            continue
        allowed = rest[0] == own or FLOOR[rest[0]] < FLOOR[own]
        assert allowed, f"{path.relative_to(PACKAGE)} imports {name}, which is not below it"


def test_importing_the_package_loads_no_method_and_no_program() -> None:
    below = {folder for floor in FLOORS[:6] for folder in floor}
    for name in imported(PACKAGE / "__init__.py"):
        if name.startswith("metafast."):
            assert name.split(".")[1] in below, name


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(path) for path in MODULES} - {"__init__"} <= FLOOR.keys()


def test_importing_loads_no_compiler() -> None:
    """torch._dynamo, which much of torch imports in passing, takes as long as torch itself."""
    code = "import sys, metafast.methods; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
