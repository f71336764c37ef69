"""No method is named outside its own folder: all other code relies on what its config declares."""

import ast
from pathlib import Path

import pytest

import hf_ft
from hf_ft.core.config import strategies

PACKAGE = Path(hf_ft.__file__).parent
OWN = {name: kind for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.strategies.")}
WORDS = {"auto"}  # also a value of options: in code, only the class identifies the method
METHODS = set(OWN) - WORDS
CONFIGS = {kind.__name__ for kind in OWN.values()}
ALLOWED = {
    "strategies": "where they live",
    "__init__.py": "the public face",
    "cli/search_blocks.py": "the command of one method",
    "cli/blocks.py": "shows what that command's search would try",
    "core/config.py": "BASELINE, what comparisons are made against",
    "diagnostics/discrimination.py": "linear_probe is a figure of features there",
    "functional.py": "l2_sp is a function there",
}


def named(file: Path) -> set[str]:
    """The methods that a file names in code, by name, config class or import; docstrings and prose are exempt."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & METHODS
        elif isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & CONFIGS
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} if (node.module or "").startswith("hf_ft.strategies") else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("hf_ft.strategies")}
    return found


def place(file: Path) -> str:
    path = file.relative_to(PACKAGE)
    return next((key for key in ALLOWED if path.is_relative_to(key)), "")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_method_is_named(file):
    assert place(file) or not named(file), f"{file} names {', '.join(sorted(named(file)))}: let its config declare it"


def test_what_is_allowed_is_needed():
    assert {place(file) for file in PACKAGE.rglob("*.py") if named(file)} == set(ALLOWED), "shorten ALLOWED"
