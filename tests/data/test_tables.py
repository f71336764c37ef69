"""Tables as people have them: separators, encodings, words that look missing, several labels, numbers as text."""

import datasets
import pytest

from hf_ft.data import load_splits
from hf_ft.data.columns import find_columns
from hf_ft.errors import DataError


@pytest.fixture(params=["file", "folder"])
def written(request, tmp_path):
    """Write a table, alone or as the training split in a folder of tables."""

    def write(text, suffix=".csv", encoding="utf-8"):
        file = tmp_path / "tables" / f"train{suffix}"
        file.parent.mkdir()
        file.write_bytes(text.encode(encoding))
        return str(file if request.param == "file" else file.parent)

    return write


def test_words_that_look_missing_are_classes_and_texts(written):
    words = ["None", "NA", "null", "nan", "N/A", "NaN"]
    source = written("text,label\n" + "\n".join(f"{text},{label}" for text in words for label in words))
    splits = load_splits(source)
    assert find_columns(splits).names == tuple(sorted(words))
    assert {text for split in splits.values() for text in split["text"][:]} == set(words)


def test_an_empty_field_is_missing(written):
    splits = load_splits(written("text,label\n" + "a,x\nb,y\n" * 5 + "c,\n"))
    with pytest.raises(DataError, match="rows have no 'label'.*row 10"):
        find_columns(splits)


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
def test_separators_are_found(separator, written):
    rows = [f'"a{separator} b"{separator}{label}' for label in ("x", "y")] * 5
    splits = load_splits(written("\n".join([f"text{separator}label", *rows])))
    assert find_columns(splits).names == ("x", "y") and splits["train"]["text"][0] == f"a{separator} b"


def test_encodings_are_reported(written):
    source = written("text,label\n" + "gut,x\nschön,y\n" * 5, encoding="latin-1")
    with pytest.raises(DataError, match="is not utf-8: line 3 has the byte 0xf6. Set encoding, such as 'latin-1'"):
        load_splits(source)
    assert "schön" in load_splits(source, encoding="latin-1")["train"]["text"][:]
    with pytest.raises(DataError, match="encoding='latin-7x' is unknown"):
        load_splits(source, encoding="latin-7x")


def test_an_encoding_for_files_that_have_none(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"] * 4, "label": [0, 1] * 2}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="encoding='latin-1' has no effect"):
        load_splits(str(tmp_path / "a.parquet"), encoding="latin-1")


SEVERAL = {
    "words": ([["a", "c"], ["b"], ["a"], []], ("a", "b", "c"), [[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]),
    "numbers": ([[2, 5], [7], [2], []], ("2", "5", "7"), [[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]),
    "zeros and ones": ([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], ("0", "1", "2"), None),
    "floats": ([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], ("0", "1"), None),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_labels(kind, suffix, tmp_path):
    labels, names, expected = SEVERAL[kind]
    table = datasets.Dataset.from_dict({"text": ["t"] * 40, "label": labels * 10})
    file = tmp_path / f"rows.{suffix}"
    table.to_parquet(file) if suffix == "parquet" else table.to_json(file, lines=suffix == "jsonl")
    splits = load_splits(str(file))
    columns = find_columns(splits)
    assert columns.problem_type == "multi_label_classification" and columns.names == names
    rows = [[float(x) for x in row] for row in (expected or labels)]
    assert columns.encode(labels) == rows and all(isinstance(x, float) for row in columns.encode(labels) for x in row)


def test_columns_that_may_be_labels_are_named():
    table = {
        "text": [f"film {i}" for i in range(8)],
        "genre": ["a", "b"] * 4,
        "id": list(range(8)),
        "stars": [1, 2, 3, 4] * 2,
    }
    with pytest.raises(DataError, match=r"no label column among .*: set label_column, such as 'genre' or 'stars'"):
        find_columns(datasets.Dataset.from_dict(table))


def test_several_labels_of_which_training_lacks_one():
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["t"] * 4, "label": [["a"], ["b"], ["a", "b"], ["a"]]}),
        test=datasets.Dataset.from_dict({"text": ["t"] * 2, "label": [["c"], ["b", "c"]]}),
    )
    with pytest.raises(DataError, match=r"split 'test' has classes that no training row has: 'c' \(2 rows\)"):
        find_columns(splits)
