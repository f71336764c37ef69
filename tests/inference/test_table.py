"""Predictions as rows: the columns of each kind of model, and which files may be replaced."""

import json

import numpy as np
import pytest

from hf_ft.data.inputs import Wanted
from hf_ft.errors import OptionError
from hf_ft.inference.predictor import Prediction
from hf_ft.inference.table import Layout, is_ours

SINGLE = Wanted("text", "single_label_classification", ("a, b", "c"))
SEVERAL = Wanted("text", "multi_label_classification", ("x", "y", "z"))
NUMBER = Wanted("text", "regression", ("LABEL_0",))


def lines(wanted, outputs, **more):
    """The lines of two samples, the second of which cannot be read."""
    given = [Prediction(0, None, np.array(outputs)), Prediction(1, None, None, error="no text")]
    return [line.rstrip("\n") for line in Layout(wanted, **more).lines(given)]


def test_the_columns_of_each_kind():
    head = ["row,label,probability,label_2,probability_2,error", '0,"a, b",0.75,c,0.25,', "1,,,,,no text"]
    assert lines(SINGLE, [0.75, 0.25], top_k=2) == head
    head = ["row,labels,probabilities,true_label,error", "0,z;x,0.9;0.6,,", "1,,,,no text"]
    assert lines(SEVERAL, [0.6, 0.5, 0.9], labelled=True) == head
    assert lines(NUMBER, [1.25]) == ["row,value,error", "0,1.25,", "1,,no text"]
    found = list(map(json.loads, lines(SEVERAL, [0.6, 0.5, 0.9], format="jsonl", threshold=0.8)))
    assert found == [{"row": 0, "labels": ["z"], "probabilities": [0.9]}, {"row": 1, "error": "no text"}]


def test_a_true_label_may_come_late():
    given = [Prediction(0, None, np.array([1.0, 0.0])), Prediction(1, None, np.array([1.0, 0.0]), label=1)]
    assert list(Layout(SINGLE, labelled=True).lines(given))[2] == '1,"a, b",1.0,c,\n'
    given = [Prediction(0, None, np.array([0.1, 0.2, 0.9]), label=[1.0, 0.0, 1.0])]
    assert list(Layout(SEVERAL, labelled=True).lines(given))[1] == "0,z,0.9,x;z,\n"


@pytest.mark.parametrize(
    ("wanted", "more", "told"),
    [
        (SINGLE, {"top_k": 3}, "top_k=3: the model has 2 classes"),
        (SEVERAL, {"top_k": 2}, "top_k=2 has no effect"),
        (SEVERAL, {"threshold": 1.0}, "threshold=1.0: set it between"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(wanted, more, told):
    with pytest.raises(OptionError, match=told):
        Layout(wanted, **more)


@pytest.mark.parametrize("wanted", [SINGLE, SEVERAL, NUMBER])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_own_files_may_be_replaced(wanted, form, tmp_path):
    written = lines(wanted, [0.5] * len(wanted.names), format=form, labelled=True)
    for number in range(len(written) if form == "jsonl" else 1):  # the first sample may be unreadable
        (tmp_path / "a").write_text("\n".join(written[number:]))
        assert is_ours(tmp_path / "a")


OTHERS = ("file,label\na,b\n", '{"row": 1}\n', '["file"]\n', "{", "\x80", "text,label,error\n", "file,label,error\n")
LABELS = ('{"file": "a", "label": "cat", "rater": "me"}\n', '{"file": "a", "label": "cat"}\n')


@pytest.mark.parametrize("text", OTHERS + LABELS)
def test_files_of_others_may_not_be_replaced(text, tmp_path):
    (tmp_path / "a").write_text(text, encoding="latin-1")
    assert not is_ours(tmp_path / "a")
