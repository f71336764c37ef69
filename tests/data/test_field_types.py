"""Column types are inferred from all fields of a file, whatever their order."""

import pytest

from hf_ft.data.field_types import FieldTypes
from hf_ft.data.files import read_files


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (["1", "-20", "+3", " 4"], "int64"),
        (["1", ""], "float64"),
        (["1", "2.5", ".5", "1e-3", "0."], "float64"),
        (["True", "false"], "bool"),
        (["True", ""], "string"),
        (["1", "True"], "string"),
        (["001", "2"], "string"),
        (["1", "12345678901234567890"], "string"),
        (["1", "nan"], "string"),
        (["1", "."], "string"),
        (["1", "1,5"], "string"),
        (["1", "a\nb"], "string"),
        ([" ", "1"], "string"),
        (["", ""], "float64"),
    ],
)
def test_types(fields, kind, tmp_path):
    types = FieldTypes(2)
    for field in fields:
        types.see(["x", field])
    assert types.named(["text", ""]) == {"text": "string", "Unnamed: 1": kind}
    rows = [f'x,"{field}"' for field in fields]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    read = read_files(str(tmp_path / "a.csv"))["train"]
    assert read.features["label"].dtype == kind and [value is None for value in read["label"][:]] == [
        not field for field in fields
    ]


def test_short_records_have_missing_fields():
    types = FieldTypes(2)
    types.see(["1"])
    assert types.named("ab") == {"a": "int64", "b": "float64"}


def test_a_word_after_many_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,note\n" + "x,1,\n" * 12_000 + "x,other,late\n")
    read = read_files(str(tmp_path / "a.csv"))["train"]
    assert read["label"][0] == "1" and read[-1] == {"text": "x", "label": "other", "note": "late"}
