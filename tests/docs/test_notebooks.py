"""The notebooks in examples/ run without a display, and are stored without outputs."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_kept_without_outputs(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "".join(cell["source"])
        assert not cell["metadata"], cell["metadata"]
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert content["metadata"]["language_info"] == {"name": "python"}  # without the Python version that saved it


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(notebook, tmp_path):
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    content = nbformat.read(notebook, as_version=4)
    client.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in content.cells for out in cell.get("outputs", ()))
    assert "'train': 80, 'validation': 40, 'test': 200" in printed
    assert "stage 0: loss" in printed and "stage 1: loss" in printed
    assert "1 full" in printed or "1 linear_probe" in printed
    assert printed.count("with probability") == 5 and "'balanced_accuracy'" in printed
