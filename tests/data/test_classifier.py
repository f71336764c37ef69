"""Models loaded for a dataset: a processor that cannot process its samples is refused at once."""

import json

import pytest
from transformers import ViTImageProcessorPil

from hf_ft.data.classifier import load_classifier
from hf_ft.data.columns import find_columns
from hf_ft.errors import OptionError
from hf_ft.testing import tiny_resnet
from tests.comparison.small_comparison import splits


@pytest.mark.parametrize("change", [{"image_mean": [0.5, 0.5]}, {"image_std": ["", 1, 1]}, {"size": {"height": 0.5}}])
def test_a_processor_that_fails_is_named(change, tmp_path):
    tiny_resnet().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    columns = find_columns(splits())
    load_classifier(str(tmp_path), columns, seed=0)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(OptionError, match=r"preprocessor_config\.json|processor"):
        load_classifier(str(tmp_path), columns, seed=0)
