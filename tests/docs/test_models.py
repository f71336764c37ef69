"""docs/models.md is true: a fixed sample of its cells is run again."""

import gc

import pytest
import transformers

from docs.tools import matrix
from docs.tools.models import cells_of, names_of_strategies, read, sample
from hf_ft.testing.families import families

SAMPLE: dict[str, list[str]] = {}
for _model, _strategy in sample():
    SAMPLE.setdefault(_model, []).append(_strategy)


def table(headers, rows):
    return "\n".join("|".join(cells) for cells in (headers, *rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_cell_is_as_on_the_page(name):
    """The outcome and the kind of reason; with other versions of Transformers, only that it is not wrong."""
    kept = read()
    gc.freeze()  # each training run collects garbage
    for row in cells_of(name, SAMPLE[name]):
        known = kept[name, row["strategy"]]
        if known["transformers"] == transformers.__version__:
            assert matrix.kind_of(row) == matrix.kind_of(known), row
        elif known["outcome"] != "wrong":
            assert row["outcome"] != "wrong", row


def test_the_sample_has_every_strategy_and_every_kind_of_data():
    cells = sample()
    assert len(cells) == len(set(cells)) == 40
    strategies = [strategy for _, strategy in cells]
    assert set(strategies) == set(names_of_strategies())
    assert {families()[model] for model, _ in cells} == {"image", "text", "audio", "video"}


def test_a_table_shows_the_stored_results(monkeypatch):
    outcomes = {
        ("Vivit", "full"): ("works", ""),
        ("Vivit", "bss"): ("refused", "bss: it is (4, 3)"),
        ("VJEPA2", "bss"): ("refused", "bss: it is (8, 9)"),
        ("VJEPA2", "soft"): ("wrong", "no: 'a'"),
    }
    rows = [
        {"model": f"{name}ForVideoClassification", "strategy": strategy, "outcome": outcome, "reason": reason}
        for (name, strategy), (outcome, reason) in outcomes.items()
    ]
    monkeypatch.setattr(matrix, "read", lambda: {(row["model"], row["strategy"]): row for row in rows})
    lines = {line.split("|")[0]: line.split("|") for line in matrix.table_of_models(table, "video").splitlines()}
    column = {name.strip("`"): place for place, name in enumerate(lines["class"])}
    vivit, vjepa = (lines[f"`{name}ForVideoClassification`"] for name in ("Vivit", "VJEPA2"))
    assert (vivit[column["full"]], vivit[column["bss"]], vivit[column["soft"]]) == ("✓", "r1", "")
    assert (vjepa[column["bss"]], vjepa[column["soft"]]) == ("r1", "w1")
    assert "r1|2|2|" in matrix.table_of_reasons(table)
