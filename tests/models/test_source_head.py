"""The pretrained head is kept beside a new one: nothing is loaded twice, and none of it is saved."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import hf_ft
from hf_ft import OptionError, SoftConfig
from hf_ft.models.source_head import head_module, head_modules, pretrained_logits, source_head
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.models import tiny_deit, tiny_distilbert
from hf_ft.testing.training import equipped, make_trainer, snapshot
from hf_ft.zoo.models import load_model
from tests.models.heads import headed, padded, without_labels


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS)
def test_the_old_head_gives_the_checkpoints_logits(make, tmp_path):
    old = make(num_labels=7)
    hf_ft.models.source_head.renew_head(new := copy.deepcopy(old), {"num_labels": 4})
    inputs = {name: value for name, value in tiny_inputs(old).items() if name != "labels"}
    assert torch.allclose(pretrained_logits(new, inputs), old(**inputs).logits, atol=1e-6)
    with torch.no_grad():
        assert new(**inputs).logits.shape == (4, 4)
    body, before = snapshot(new), snapshot(old)
    head = head_modules(new)
    same_tensors(*({n: v for n, v in s.items() if not n.startswith(head)} for s in (body, before)))


def test_loaded_once_from_a_folder(tmp_path, monkeypatch):
    tiny_vit(num_labels=7, id2label={i: f"c{i}" for i in range(7)}).save_pretrained(tmp_path)
    loads, load = [], AutoModelForImageClassification.from_pretrained.__func__
    monkeypatch.setattr(
        AutoModelForImageClassification,
        "from_pretrained",
        classmethod(lambda *a, **k: (loads.append(1), load(*a, **k))[1]),
    )
    model = hf_ft.from_pretrained(str(tmp_path), id2label={0: "a", 1: "b"})
    assert len(loads) == 1
    assert model.config.num_labels == model.num_labels == 2 and model.config.id2label == {0: "a", 1: "b"}
    assert source_head(model).names[3] == "c3" and source_head(model).classes == 7
    assert not any("source" in name for name in model.state_dict())
    same = hf_ft.from_pretrained(str(tmp_path), id2label={0: "a", 1: "b"})
    same_tensors(snapshot(model), snapshot(same))  # also for the new head, whatever was drawn in between
    assert hf_ft.from_pretrained(str(tmp_path), num_labels=2, dtype=torch.bfloat16).dtype == torch.bfloat16
    other = hf_ft.from_pretrained(str(tmp_path), num_labels=2, seed=1)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_even_a_head_that_would_fit_is_replaced(tmp_path):
    old = tiny_resnet(num_labels=3)
    old.save_pretrained(tmp_path)
    model = hf_ft.from_pretrained(str(tmp_path), num_labels=3)
    assert not torch.equal(model.classifier[1].weight, old.classifier[1].weight)
    assert torch.equal(source_head(model).module[1].weight, old.classifier[1].weight)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(plain.classifier[1].weight, old.classifier[1].weight)
    with pytest.raises(OptionError, match="hf_ft.from_pretrained"):
        source_head(plain)


def test_a_checkpoint_without_a_head_has_none_to_keep(tmp_path):
    tiny_vit().vit.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)), torch.nn.Module)
    model = hf_ft.from_pretrained(str(tmp_path), num_labels=3, task="image")
    with pytest.raises(OptionError, match="checkpoint had none"):
        source_head(model)


def test_classes_are_needed():
    with pytest.raises(ValueError, match="num_labels or id2label"):
        hf_ft.from_pretrained("mobilenet_v2")


def test_a_single_layer_is_the_input_of_a_head_of_one_module_only():
    with pytest.raises(OptionError, match="2 modules with parameters.*head='...'"):
        head_module(tiny_distilbert())
    assert head_module(tiny_distilbert(), head="classifier") == "classifier"
    assert head_module(tiny_deit()) == "classifier"


@pytest.mark.parametrize("name", ["distilbert", "gpt2"])
def test_heads_of_other_kinds_from_a_folder(name, tmp_path):
    old = headed(name, 7)
    old.save_pretrained(tmp_path / "whole")
    model = hf_ft.from_pretrained(str(tmp_path / "whole"), num_labels=3)
    inputs = without_labels(padded(name))
    assert source_head(model).classes == 7
    assert torch.allclose(pretrained_logits(model, inputs), old(**inputs).logits, atol=1e-6)
    same = hf_ft.from_pretrained(str(tmp_path / "whole"), num_labels=3)
    same_tensors(snapshot(model), snapshot(same))
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(type(old).from_pretrained(tmp_path / "new")(**inputs).logits, model(**inputs).logits)
    old.base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(OptionError, match="checkpoint had none"):
        source_head(hf_ft.from_pretrained(str(tmp_path / "base"), num_labels=3, task="text"))


def test_a_head_by_name(tmp_path):
    old = tiny_distilbert(num_labels=7)
    old.save_pretrained(tmp_path)
    model = hf_ft.from_pretrained(str(tmp_path), num_labels=3, head="classifier")
    assert torch.equal(source_head(model).module.weight, old.classifier.weight)
    assert torch.equal(model.pre_classifier.weight, old.pre_classifier.weight)
    config = SoftConfig(schedule="constant", head="classifier")
    logged = make_trainer(model, config, tmp_path / "run")
    logged.train()
    assert "loss/source" in logged.state.log_history[0]


@pytest.mark.parametrize("adapted", ["classifier kept in full", "classifier frozen"])
def test_with_adapters(adapted, tmp_path):
    config = SoftConfig(schedule="constant")
    model = equipped(tiny_vit(), config)
    kept = {"modules_to_save": ["classifier"]} if "full" in adapted else {}
    lora = get_peft_model(model, LoraConfig(target_modules=["query", "q_proj", "attention.query"], r=2, **kept))
    before = snapshot(lora)
    trainer = make_trainer(lora, config, tmp_path)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert "loss/source" in logged
    moved = [name for name, value in snapshot(trainer.model).items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)


@pytest.mark.real
def test_real_weights_give_imagenet_logits():
    plain, _ = load_model("mobilenet_v2", image_size=64)
    model = hf_ft.from_pretrained("mobilenet_v2", num_labels=2, image_size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = pretrained_logits(model, {"pixel_values": images})
        assert torch.allclose(found, plain.eval()(pixel_values=images).logits, atol=1e-4)
    assert source_head(model).classes == 1000
