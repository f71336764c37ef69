"""Labels as numbered by a trained model's classes."""

import pytest
from datasets import ClassLabel, Dataset, Features

from hf_ft.data.labels_by_name import labels_by_name

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize(
    ("names", "found"), [(("-1", "1"), [1, 0, None]), (("0", "1"), [1, None, None])], ids=["a class", "hidden"]
)
def test_a_negative_number_is_a_class_if_the_model_has_it(names, found):
    rows = Dataset.from_dict({"label": [1, -1, None], "several": [[1], [-1], None]})
    assert labels_by_name(rows, "label", names, SINGLE) == found
    several = [[float(number == one) for number in range(2)] for one in found[:2]]
    assert labels_by_name(rows, "several", names, SEVERAL) == [*several, None]


def test_a_negative_class_number_is_no_class():
    rows = Dataset.from_dict({"label": [-1, 0]}, Features(label=ClassLabel(names=["-1", "1"])))
    assert labels_by_name(rows, "label", ("-1", "1"), SINGLE) == [None, 0]
