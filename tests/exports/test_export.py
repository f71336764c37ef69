"""Exports give the logits of the model for any batch size; what cannot be exported leaves nothing behind."""

import importlib
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

import hf_ft
from hf_ft.errors import DataError, OptionError
from hf_ft.exports import graph, runtimes
from hf_ft.exports.processing import prepared_image
from hf_ft.inference import load_trained
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import combined
from hf_ft.testing.models import tiny_resnet, tiny_vit
from tests.trained import CLASSES, NAMES, TRUTH

module = importlib.import_module("hf_ft.exports.export")  # the function has the same name


pytestmark = pytest.mark.slow  # they trace
SMALL = partial(tiny_vit, num_hidden_layers=1, **NAMES)


def session(file):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def logits(folder, **inputs):
    with torch.no_grad():
        return load_trained(folder).model(**inputs).logits.numpy()


@pytest.mark.parametrize("which", ["convolutional", "adapter"])
def test_onnx_is_the_model_at_any_batch_size(which, request):
    folder, done = request.getfixturevalue(which)
    ran = session(done.folder / "model.onnx")
    (given,) = ran.get_inputs()
    assert given.name == "pixel_values" and given.shape == ["batch", 3, 32, 32]
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 32, 32)
        (found,) = ran.run(["logits"], {"pixel_values": images.numpy()})
        np.testing.assert_allclose(found, logits(folder, pixel_values=images), rtol=1e-4, atol=1e-4)
    assert done.content["check"]["samples"] == 12 and done.content["files"]["model.onnx"]["largest_difference"] < 1e-4


def test_a_reloaded_program_gives_the_models_logits(convolutional):
    folder, done = convolutional
    program = torch.export.load(done.folder / "model.pt2").module()
    for size in (1, 4):
        images = torch.randn(size, 3, 32, 32)
        found = program(pixel_values=images).detach()
        np.testing.assert_allclose(found, logits(folder, pixel_values=images), rtol=1e-5, atol=1e-5)


def test_texts_have_a_free_length_and_their_tokenizer(text):
    folder, done = text
    ran = session(done.folder / "model.onnx")
    assert {one.name: one.shape for one in ran.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    (part,) = done.content["processing"]
    tokenizer = Tokenizer.from_file(str(done.folder / part["text"]["tokenizer"]))
    plain = AutoTokenizer.from_pretrained(folder)
    for texts in (["a very good film", "bad"], ["good " * 60] * 3, ["film"]):
        encoded = tokenizer.encode_batch(texts)
        feed = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
        wanted = plain(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
        wanted = {name: wanted[name] for name in feed}
        assert all(wanted[name].tolist() == values for name, values in feed.items())
        (found,) = ran.run(["logits"], {name: np.array(values) for name, values in feed.items()})
        np.testing.assert_allclose(found, logits(folder, **wanted), rtol=1e-4, atol=1e-4)


def test_images_are_prepared_and_int8_is_scored_as_the_record_says(files, convolutional):
    folder, done = convolutional
    content = json.loads((done.folder / "export.json").read_text())
    plain, small = (content["files"][name] for name in ("model.onnx", "model.int8.onnx"))
    assert small["bytes"] < plain["bytes"] and small["largest_difference"] > plain["largest_difference"]
    assert plain["agreement"] == 1.0 and plain["scores"] == pytest.approx(content["check"]["scores"], abs=1e-4)
    photos = [Image.open(files / "photos" / name / f"{i}.png") for name in content["classes"] for i in range(4)]
    images = np.stack([prepared_image(photo, content["processing"][0]["image"]) for photo in photos])
    found = {
        name: session(done.folder / name).run(None, {"pixel_values": images})[0]
        for name in content["files"]
        if "onnx" in name
    }
    wanted = [one.outputs for one in hf_ft.predict(folder, files / "photos", device="cpu")]
    shares = np.exp(found["model.onnx"]) / np.exp(found["model.onnx"]).sum(1, keepdims=True)
    np.testing.assert_allclose(shares, wanted, atol=1e-5)
    right = found["model.int8.onnx"].argmax(1) == TRUTH
    assert small["scores"]["accuracy"] == pytest.approx(right.mean())
    assert small["agreement"] == (found["model.int8.onnx"].argmax(1) == shares.argmax(1)).mean()


def test_the_record_describes_all_files_and_no_file_names_this_machine(convolutional, text):
    for folder, done in (convolutional, text):
        content = json.loads((done.folder / "export.json").read_text())
        assert content == done.content and content["model"] == folder.name
        assert {file.name for file in done.folder.iterdir()} == {*content["files"], "export.json"}
        for file in done.files:
            told = file.read_bytes()
            assert not any(part.encode() in told for part in (str(folder), "site-packages", sys.prefix))
    assert content["classes"] == ["bad", "good"] and content["activation"] == "softmax"


@pytest.mark.usefixtures("traced_before")
def test_existing_files_are_kept_unless_they_may_be_replaced(files, tmp_path):
    model, processor = tiny_resnet(**NAMES), AutoImageProcessor.from_pretrained(files / "resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = hf_ft.export(model, tmp_path, processor=processor, formats="pt2")
    assert done.content["check"]["data"] == "random samples" and done.content["check"]["batch_sizes"] == [1, 3]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())
    with pytest.raises(OptionError, match="model.pt2 exists: name another folder, or set overwrite=True"):
        hf_ft.export(model, tmp_path, processor=processor, formats="pt2")
    (tmp_path / "notes.txt").write_text("mine")
    stale = {**done.content, "files": {**done.content["files"], "model.int8.onnx": {}, "../away": {}}}
    (tmp_path / "export.json").write_text(json.dumps(stale))
    (tmp_path / "model.int8.onnx").write_text("of an earlier export")
    hf_ft.export(model, tmp_path, processor=processor, formats="pt2", overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "model.pt2", "export.json"}


def test_a_model_with_two_paths_and_an_ensemble_are_one_graph(files, trained, tmp_path):
    gated = trained(partial(tiny_resnet, depths=[1, 1]), "spot_tune")
    done = hf_ft.export(gated, tmp_path / "gated", data=files / "photos", formats="pt2", samples=4)
    assert done.content["files"]["model.pt2"]["largest_difference"] < 1e-5 and done.content["check"]["samples"] == 4
    one, two = (AutoImageProcessor.from_pretrained(files / "resnet") for _ in range(2))
    two.image_mean, two.do_resize = [0.3] * 3, True
    members = CollaborativeModel.from_members([tiny_resnet(**NAMES), SMALL()], inputs=[0, 1])
    done = hf_ft.export(members, tmp_path / "both", processor=combined([one, two]), formats="pt2")
    first, second = done.content["processing"]
    assert set(done.content["inputs"]) == {"pixel_values", "pixel_values_1"}
    assert second["inputs"] == {"pixel_values": "pixel_values_1"} and second["image"]["mean"] == [0.3] * 3
    assert first["image"]["mean"] == [0.5] * 3 and done.content["classes"] == list(CLASSES)


class Decides(nn.Module):
    """Computes one of two things, depending on its input."""

    def forward(self, values):
        return values * 2 if values.sum() > 0 else values


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(files, tmp_path):
    model, processor = tiny_resnet(**NAMES), AutoImageProcessor.from_pretrained(files / "resnet")
    model.classifier.append(Decides())
    with pytest.raises(OptionError, match=r"cannot be traced by torch.export.*data-dependent") as caught:
        hf_ft.export(model, tmp_path / "out", processor=processor, formats="pt2")
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


def test_attention_that_an_exporter_does_not_know_is_computed_step_by_step(monkeypatch, files, tmp_path):
    model, processor = SMALL(), AutoImageProcessor.from_pretrained(files / "resnet")
    attention = []

    def trace(plain, example):
        attention.append(plain.config._attn_implementation)
        if attention[-1] != "eager":
            raise RuntimeError("unknown operator")
        return graph.traced(plain, example)

    monkeypatch.setattr(module, "traced", trace)
    hf_ft.export(model, tmp_path, processor=processor, formats="pt2")
    assert attention == ["sdpa", "eager"] and model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("traced_before")
def test_other_logits_and_unreadable_data_are_refused_and_nothing_is_written(monkeypatch, files, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 samples to compare on can be read"):
        hf_ft.export(files / "resnet", tmp_path / "out", data=tmp_path / "a.png", formats="pt2")

    def shifted(file):
        run = runtimes.in_program(file)
        return lambda inputs: run(inputs) + 0.01

    monkeypatch.setattr(module, "in_program", shifted)
    with pytest.raises(OptionError, match=r"model.pt2 differ by 0.0\d+ from .* random samples, more than tolerance=0"):
        hf_ft.export(files / "resnet", tmp_path / "out", formats="pt2")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"formats": ("tflite",)}, "formats='tflite': choose onnx or pt2"),
        ({"quantize": "int4"}, "quantize='int4': only int8"),
        ({"formats": "pt2", "quantize": "int8"}, "add onnx to the formats"),
        ({"tolerance": 0}, "tolerance=0: set it between"),
        ({"samples": 0}, "samples=0: set it to at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, told, files, tmp_path):
    with pytest.raises(OptionError, match=told):
        hf_ft.export(files / "resnet", tmp_path, **options)
