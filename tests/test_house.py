"""The order of the house: who may import whom, by the import statements of every module.

Imports inside functions and under ``TYPE_CHECKING`` count as well. docs/architecture.md draws the floors.
"""

import ast
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
# From the top down. A room imports from the floors below; rooms on one floor do not import each other.
FLOORS = (
    "face",
    "cli testing",
    "strategies comparison exports",
    "trainer inference",
    "search",
    "engine",
    "advice",
    "data diagnostics",
    "core",
    "zoo",
    "models",
    "functional documents",
    "splits metrics records",
    "errors lazy processes version",
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
# Downwards, but forbidden nevertheless.
FORBIDDEN = {
    "models": "core data engine",
    "zoo": "core data engine",
    "core": "data engine",
    "data": "core engine",
    "engine": "trainer search strategies",
    "search": "trainer strategies",
    "strategies": "trainer comparison zoo",
    "trainer": "strategies search",
    "inference": "strategies search advice diagnostics",  # a trained model is used without the code that trained it
    "exports": "strategies trainer search advice diagnostics",
    "comparison": "strategies",
    "advice": "strategies",
    "testing": "strategies",
}
OPTIONAL = {
    "elpv_dataset",
    "grpc",  # with optuna
    "kornia",
    "matplotlib",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",  # with mlxtend
    "soundfile",
    "sqlalchemy",  # with optuna
}


def modules(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), file


MODULES = dict(modules("hf_ft"))
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imported(tree):
    """Modules of the package that a syntax tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


ARROWS = [(name, target) for name, tree in TREES.items() for target in imported(tree) if target in MODULES]


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "face"


def between_rooms():
    return [(a, b) for a, b in ARROWS if room(a) != room(b)]


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_arrow_goes_up():
    assert [f"{a} -> {b}" for a, b in between_rooms() if FLOOR[room(a)] <= FLOOR[room(b)]] == []


def test_no_arrow_is_forbidden():
    found = [f"{a} -> {b}" for a, b in between_rooms() if room(b) in FORBIDDEN.get(room(a), "").split()]
    assert found == []


def test_nothing_imports_the_face():
    assert [a for a, b in ARROWS if b == "hf_ft" and a not in ("hf_ft.__main__",)] == []


def test_a_strategy_imports_no_other_and_neither_loss_nor_data():
    for a, b in ARROWS:
        if room(a) == "strategies" and a != "hf_ft.strategies":
            own = ".".join(a.split(".")[:3])
            assert room(b) != "strategies" or b.startswith(own), f"{a} -> {b}"
            assert b != "hf_ft.engine.objective", f"{a} -> {b}"
            assert room(b) != "data" or b == "hf_ft.data.source_labels", f"{a} -> {b}"


def test_there_is_no_import_cycle():
    graph = networkx.DiGraph((a, b) for a, b in ARROWS if a != b)
    circles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []


@pytest.mark.parametrize("name", TREES)
def test_imports_inside_functions_are_for_optional_libraries(name):
    for function in ast.walk(TREES[name]):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                    assert {n.partition(".")[0] for n in names} <= OPTIONAL, f"line {node.lineno}: {names}"
