"""The house: no package imports an entry, packages form no circle, and infer/ knows nothing of train/."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from infer.program.paths import ROOT

WINGS = ("infer", "train")
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for wing in WINGS
    for file in (ROOT / wing).rglob("*.py")
}
ENTRIES = {name for name in MODULES if name.count(".") == 1 and not name.endswith("__init__")}


def imports(file: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys()


ARROWS = {name: imports(file) for name, file in MODULES.items()}


def package(name: str) -> str:
    return name.rpartition(".")[0]


def test_no_package_imports_an_entry() -> None:
    wrong = [
        f"{name} imports {other}" for name, found in ARROWS.items() if name not in ENTRIES for other in found & ENTRIES
    ]
    assert not wrong, wrong


def test_inference_knows_nothing_of_training() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, found in ARROWS.items()
        if name.startswith("infer.")
        for other in found
        if other.startswith("train.")
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("of", ["modules", "packages"])
def test_imports_form_no_circle(of: str) -> None:
    graph: dict[str, set[str]] = {}
    for name, found in ARROWS.items():
        if of == "modules":
            graph[name] = found
        elif name not in ENTRIES:
            graph.setdefault(package(name), set()).update({package(other) for other in found} - {package(name)})
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
    assert len(order) >= len(graph)
