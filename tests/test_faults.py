"""The harness of `make faults`: what it keeps, how it damages, and that it finds differences."""

import json
import random

from tests.faults.lasting import differences
from tests.faults.mutants import damaged_bytes, damaged_json, damaged_tensors
from tests.faults.results import Kept, Result, table


def test_results_are_kept_and_an_incomplete_line_is_ignored(tmp_path):
    file = tmp_path / "results.jsonl"
    results = [Result(f"kills/full/{number}", 0, "right", "", 1, 0.5) for number in range(3)]
    for result in results[:2]:
        Kept(file).add(result)
    file.write_text(file.read_text()[:-9])
    assert Kept(file).of_seed(0) == results[:1] and not Kept(file).of_seed(1)
    Kept(file).add(results[2])
    assert Kept(file).of_seed(0) == [results[0], results[2]]


def test_the_table_counts_by_part_and_kind():
    verdicts = ("right", "hang", "traceback", "wrong result")
    rows = table(Result(f"mutations/flags/{i}", 0, verdict, "", i, 1.0) for i, verdict in enumerate(verdicts))
    assert rows == [("mutations", kind, "4", "6", "1", "1", "1") for kind in ("flags", "all")]


def test_damage_is_determined_by_its_seed():
    content = json.dumps({"a": [1, {"b": None}], "c": "x"}).encode()
    for damage in (damaged_bytes, damaged_json):
        some = [damage(content, random.Random(seed)) for seed in range(20)]
        assert some == [damage(content, random.Random(seed)) for seed in range(20)] and len(set(some)) > 10
    tensors = (2).to_bytes(8, "little") + b"{}"
    assert damaged_tensors(tensors, random.Random(1)) != tensors


def test_differences_are_reported_by_file_and_place():
    one = {"a.json": {"x": [1, 2]}, "b": ""}
    assert not differences(one, dict(one))
    told = differences(one, {"a.json": {"x": [1, 3]}, "c": ""})
    assert told == ["b is missing", "c is left over", "a.json differs at x[1]: 2 became 3"]
