"""A PEFT model is a valid model: strategies act on what it trains, and it is saved the way PEFT does."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification

from docs.tools.tables import documented
from hf_ft import CheckpointError, L2SPConfig, OptionError, PEFTConfig
from hf_ft.testing import same_tensors, suited, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, snapshot

pytestmark = pytest.mark.slow

VIT = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
RESNET = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
SAVING = {"save_strategy": "steps", "save_steps": 2}


def lora(make=tiny_vit, config=VIT):
    torch.manual_seed(0)
    model = make()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if make is tiny_vit and "q_proj" not in names:
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


# What is not applicable to adapters, and the message that says so.
REFUSED = {
    "peft": "already a PEFT model",
    "spot_tune": "cannot have two paths",
    "ada_filter": "cannot have two paths",
    "wise_ft": "factors of a product",
}


@pytest.mark.parametrize("name", documented())
def test_only_what_peft_trains_is_trained(name, tmp_path):
    model = lora()
    before = snapshot(model)
    allowed = {n for n, p in model.named_parameters() if p.requires_grad}
    config = documented()[name]()
    if config.adapted(model) is None or name in REFUSED:
        with pytest.raises(OptionError, match=REFUSED.get(name, "no BatchNorm")):
            train(model, config, tmp_path)
        return
    trainer = train(model, suited(config, model), tmp_path)
    changed = {n for n, t in snapshot(trainer.model).items() if not torch.equal(t, before[n])}
    assert changed and changed <= allowed


@pytest.mark.parametrize(("make", "config"), [(tiny_vit, VIT), (tiny_resnet, RESNET)])
def test_saved_adapter_is_peft_s_own(make, config, tmp_path):
    """BatchNorm statistics of frozen layers do not move, so the adapter alone gives the same logits."""
    trainer = train(lora(make, config), "l2_sp", tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    inputs = tiny_inputs(make())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    assert (tmp_path / "saved" / "ft_config.json").is_file()


def test_a_local_base_is_reported_before_an_adapter_is_pushed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)
    monkeypatch.setattr("hf_ft.models.sharing.created", lambda *_, **__: "me/x")
    tiny_vit().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny_vit()).from_pretrained(tmp_path / "base"), VIT)
    trainer = make_trainer(model, "full", tmp_path / "run", push_to_hub=True, hub_model_id="me/x", hub_token="x")
    trainer.save_model(_internal_call=True)
    assert f"is a local folder, '{tmp_path / 'base'}': the upload refers to it only as 'base'" in caplog.text


@pytest.mark.parametrize(("make", "config"), [(tiny_vit, VIT), (tiny_resnet, RESNET)])
def test_resume_and_best_model(make, config, tmp_path):
    arguments = {**SAVING, "eval_strategy": "steps", "eval_steps": 2}
    whole = train(lora(make, config), L2SPConfig(), tmp_path, **arguments)
    again = train(lora(make, config), L2SPConfig(), tmp_path, resume=str(tmp_path / "checkpoint-4"), **arguments)
    same_tensors(snapshot(whole.model), snapshot(again.model))
    kept = {}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "goal"}
    trainer = make_trainer(lora(make, config), "full", tmp_path / "best", **arguments)

    def metrics(prediction):
        kept[trainer.state.global_step] = snapshot(trainer.model)
        return {"goal": float(trainer.state.global_step == 4)}

    trainer.compute_metrics = metrics
    trainer.train()
    same_tensors(snapshot(trainer.model), kept[4])
    with pytest.raises(AssertionError):
        same_tensors(kept[4], kept[8])


def test_no_delta_of_a_delta(tmp_path):
    trainer = train(lora(), "full", tmp_path)
    with pytest.raises(CheckpointError, match="already a delta"):
        trainer.save_delta(tmp_path / "delta")


def test_a_save_replaces_the_weights_of_another_kind(tmp_path):
    saved = tmp_path / "saved"
    adapter = train(tiny_vit(), PEFTConfig(merge=False), tmp_path / "adapter")
    whole = train(tiny_vit(), "full", tmp_path / "whole")
    adapter.save_model(str(saved))
    for name in ("model-mine.safetensors", "adapter_model_old.safetensors"):
        (saved / name).touch()
    whole.save_model(str(saved))
    assert (saved / "model-mine.safetensors").exists() and (saved / "adapter_model_old.safetensors").exists()
    assert not (saved / "adapter_config.json").exists() and not (saved / "adapter_model.safetensors").exists()
    assert not (saved / "ft_buffers.safetensors").exists()
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    same_tensors(loaded.state_dict(), whole.model.cpu().state_dict())
    adapter.save_model(str(saved))
    assert not (saved / "model.safetensors").exists() and (saved / "adapter_model.safetensors").is_file()


def test_weights_that_another_program_saved_are_kept(tmp_path, caplog):
    saved = tmp_path / "saved"
    lora().save_pretrained(saved)
    with caplog.at_level(logging.WARNING):
        train(tiny_vit(), "full", tmp_path / "whole").save_model(str(saved))
    assert (saved / "adapter_model.safetensors").is_file()
    assert "also contains adapter_config.json, adapter_model.safetensors, not written by hf_ft" in caplog.text
