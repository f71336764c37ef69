"""Trained models and data for them; exports of three kinds of models, made once."""

import importlib
import logging
import shutil
from functools import partial

import datasets
import pytest
from peft import LoraConfig
from transformers import AutoImageProcessor, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.exports import export
from hf_ft.inference import Reading
from hf_ft.strategies.peft import PEFTConfig
from hf_ft.testing import tiny_data
from hf_ft.testing.models import tiny_bert, tiny_resnet, tiny_vit
from hf_ft.zoo.models import load_model
from tests.trained import NAMES, trained_files


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
    logging.getLogger("hf_ft").handlers.clear()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    root = trained_files(tmp_path_factory.mktemp("exports"))
    tiny_bert(num_labels=2, id2label={0: "bad", 1: "good"}, num_hidden_layers=1).save_pretrained(root / "bert")
    return root


@pytest.fixture(scope="session")
def program(files, tmp_path_factory):
    """The export of ``resnet`` with torch alone."""
    return export(files / "resnet", tmp_path_factory.mktemp("program"), formats="pt2").folder / "model.pt2"


@pytest.fixture
def traced_before(program, monkeypatch):
    """Exports of ``resnet`` copy a program that was traced once."""
    module = importlib.import_module("hf_ft.exports.export")
    monkeypatch.setattr(module, "_write", lambda trained, example, folder, chosen: shutil.copy(program, folder))


@pytest.fixture(scope="session")
def onnx():
    """Skip without the ONNX packages. The table of operators, which takes seconds, is built once."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    built = registration.ONNXRegistry.from_torchlib()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.ONNXRegistry, "from_torchlib", lambda *args, **options: built)
        yield


@pytest.fixture(scope="session")
def trained(files, tmp_path_factory):
    """A function that trains a model for one step with a strategy and saves it."""

    def train(make, strategy):
        folder = tmp_path_factory.mktemp("trained")
        make(seed=1).save_pretrained(folder / "base")
        processor = AutoImageProcessor.from_pretrained(files / "resnet")
        processor.save_pretrained(folder / "base")
        model = load_model(str(folder / "base"), id2label=NAMES["id2label"])[0]
        more = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        args = TrainingArguments(folder / "out", max_steps=1, learning_rate=1e-2, seed=0, **more)
        data = tiny_data(model)
        trainer = FTTrainer(model, args, strategy=strategy, train_dataset=data, processing_class=processor)
        trainer.train()
        trainer.save_model(folder / "saved")
        return folder / "saved"

    return train


@pytest.fixture(scope="session")
def convolutional(files, trained, onnx, tmp_path_factory):
    """A checkpoint with converted BatchNorm, and its export in all formats."""
    folder = trained(tiny_resnet, "daft")
    out = tmp_path_factory.mktemp("convolutional")
    return folder, export(folder, out, data=files / "photos", formats=("onnx", "pt2"), quantize="int8", batch_size=5)


@pytest.fixture(scope="session")
def adapter(files, trained, onnx, tmp_path_factory):
    """A ViT with an adapter, and its export."""
    tuner = LoraConfig(r=2, init_lora_weights=False)
    folder = trained(partial(tiny_vit, num_hidden_layers=1), PEFTConfig(tuner=tuner, merge=False))
    return folder, export(folder, tmp_path_factory.mktemp("adapter"), data=files / "photos")


@pytest.fixture(scope="session")
def text(files, onnx, tmp_path_factory):
    """A text model, and its export."""
    reading = Reading(text_column="body")
    return files / "bert", export(
        files / "bert", tmp_path_factory.mktemp("text"), data=files / "reviews.csv", reading=reading
    )
