"""Deltas, adapters and models with two paths predict like the model that was trained."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoImageProcessor, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.inference import load_trained, predict
from hf_ft.strategies.linear_probe import LinearProbeConfig
from hf_ft.strategies.peft import PEFTConfig
from hf_ft.testing import tiny_data, tiny_inputs
from hf_ft.testing.models import tiny_resnet, tiny_vit
from hf_ft.trainer.card_usage import usage
from hf_ft.zoo.models import load_model
from tests.trained import NAMES


def trained(files, folder, make, strategy):
    """A trainer after two steps from a base that is saved with its processor."""
    make(seed=1).save_pretrained(folder / "base")
    processor = AutoImageProcessor.from_pretrained(files / "resnet")
    processor.save_pretrained(folder / "base")
    model = load_model(str(folder / "base"), id2label=NAMES["id2label"])[0]
    args = TrainingArguments(folder / "out", max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", seed=0)
    trainer = FTTrainer(model, args, strategy=strategy, train_dataset=tiny_data(model), processing_class=processor)
    trainer.train()
    return trainer


def outputs(model, files, **more):
    return np.stack([one.outputs for one in predict(model, files / "photos", device="cpu", **more)])


def test_a_delta_is_applied_to_its_base(files, tmp_path):
    trainer = trained(files, tmp_path, tiny_resnet, "linear_probe")
    trainer.save_delta(tmp_path / "delta")
    found = load_trained(tmp_path / "delta", base=str(tmp_path / "base"))
    assert found.wanted.names == tuple(NAMES["id2label"].values())
    wanted = outputs(trainer.model, files, processor=found.processor)
    np.testing.assert_allclose(outputs(found.model, files, processor=found.processor), wanted, atol=1e-7)
    with pytest.raises(OptionError, match="base='x' has no effect"):
        load_trained(files / "resnet", base="x")


def test_a_model_with_two_paths_is_loaded_as_it_was(files, tmp_path):
    trainer = trained(files, tmp_path, tiny_resnet, "spot_tune")
    trainer.save_model(tmp_path / "saved")
    found = load_trained(tmp_path / "saved")
    wanted = outputs(trainer.model, files, processor=found.processor)
    np.testing.assert_allclose(outputs(tmp_path / "saved", files), wanted, atol=1e-7)


@pytest.mark.slow
def test_an_adapter_is_applied_to_its_base_with_its_head(files, tmp_path):
    tuner = LoraConfig(r=2, init_lora_weights=False)
    trainer = trained(files, tmp_path, tiny_vit, PEFTConfig(tuner=tuner, merge=False))
    trainer.save_model(tmp_path / "adapter")
    before = torch.get_rng_state()
    found = load_trained(tmp_path / "adapter")
    assert torch.equal(before, torch.get_rng_state())
    wanted = outputs(trainer.model, files, processor=found.processor)
    np.testing.assert_allclose(outputs(tmp_path / "adapter", files), wanted, atol=1e-7)
    shown = usage(trainer.model, str(tmp_path / "adapter"), base=str(tmp_path / "base"))  # another number of classes
    for code in shown.split("\n\n# With PEFT alone: "):
        exec(code if code.startswith("from") else f"# {code}", used := {})
        np.testing.assert_allclose(outputs(used["model"], files, processor=found.processor), wanted, atol=1e-7)
    with pytest.raises(CheckpointError, match="adapter is a PEFT adapter, without the weights of its base: save"):
        load_model(str(tmp_path / "adapter"), 5)
    (tmp_path / "adapter" / "config.json").unlink()
    with pytest.raises(OptionError, match="adapter without config.json"):
        load_trained(tmp_path / "adapter")


@pytest.mark.real
@pytest.mark.parametrize(
    ("strategy", "save"), [(PEFTConfig(merge=False), "save_model"), (LinearProbeConfig(), "save_delta")]
)
def test_the_base_may_have_a_short_name(strategy, save, tmp_path):
    """Configs record its public name, under which there is nothing on the Hub."""
    model, processor = load_model("mobilenet_v2", 3, image_size=64)
    args = TrainingArguments(tmp_path / "out", max_steps=1, use_cpu=True, report_to="none")
    trainer = FTTrainer(model, args, strategy=strategy, train_dataset=tiny_data(model), processing_class=processor)
    trainer.train()
    getattr(trainer, save)(str(tmp_path / "saved"))
    pixels = tiny_inputs(model)["pixel_values"]
    with torch.no_grad():
        wanted = trainer.model.eval()(pixels).logits
        for base in (None, "mobilenet_v2"):
            found = load_trained(tmp_path / "saved", base=base)
            torch.testing.assert_close(found.model(pixels).logits, wanted)
            assert found.processor.size == processor.size
