"""Adapters in the blocks, and the head, take the steps of gradient descent; merged, the model is plain again."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig
from torch import nn

from hf_ft import L2SPConfig, OptionError, PEFTConfig, State, anatomy
from hf_ft.core.options import tuner_from_json
from hf_ft.models.names import covers
from hf_ft.models.norms import norm_layers
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot

ONE_STEP = {"per_device_train_batch_size": 32, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
ONE_STEP |= {"learning_rate": 0.25, "max_grad_norm": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_step_of_lora_is_that_of_its_factors(name, tmp_path):
    base = TINY_MODELS[name]()
    before, data = snapshot(base), tiny_data(base)[:]
    trainer = make_trainer(copy.deepcopy(base), PEFTConfig(rank=2, head_lr=None), tmp_path, **ONE_STEP)
    factors = {}
    run = trainer._start_run()
    for key, module in run.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
            assert float(b.abs().max()) == 0  # so the step starts from the pretrained function
            factors[key.removeprefix("base_model.model.")] = a
    blocks = [module for block in anatomy(base).blocks for module in block.modules]
    assert factors and all(any(covers(block, key) for block in blocks) for key in factors)
    trainer.train()
    reference = TINY_MODELS[name]().double().eval()
    reference.load_state_dict({key: v.double() if v.is_floating_point() else v for key, v in before.items()})
    batch = {key: v.double() if v.is_floating_point() else v for key, v in data.items()}
    reference(**batch).loss.backward()
    assert not isinstance(trainer.model, PeftModel)
    for key, parameter in reference.named_parameters():
        wanted = parameter.detach().clone()
        if (a := factors.get(key.removesuffix(".weight"))) is not None and key.endswith(".weight"):
            # W = W0 + 2 B A, so dL/dB = 2 dL/dW A^T, and after the step B = -0.25 * 2 dL/dW A^T.
            gradient = parameter.grad.flatten(1)
            wanted += (2 * -0.25 * 2 * gradient @ a.flatten(1).T @ a.flatten(1)).view_as(parameter)
        elif key.startswith("classifier"):
            wanted -= 0.25 * parameter.grad
        torch.testing.assert_close(trainer.model.get_parameter(key).double(), wanted, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_bert])
def test_unmerged_it_is_an_adapter_of_peft(make, tmp_path):
    base = make()
    trainer = make_trainer(copy.deepcopy(base), PEFTConfig(merge=False, norms=True), tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    merged = make_trainer(copy.deepcopy(base), PEFTConfig(norms=True), tmp_path / "merged", max_steps=2)
    merged.train()
    with torch.no_grad():
        ours = trainer.model.eval()(**tiny_inputs(base)).logits
        assert torch.equal(loaded(**tiny_inputs(base)).logits, ours)
        torch.testing.assert_close(merged.model.eval()(**tiny_inputs(base)).logits, ours, atol=1e-5, rtol=1e-4)
    moved = {n for n, value in snapshot(merged.model).items() if not torch.equal(value, snapshot(base)[n])}
    names = [name for name, _ in norm_layers(base)]
    assert any(covers(name, key) for name in names for key in moved)


@pytest.mark.parametrize("order", [1, -1])
def test_penalties_on_weights_reach_what_adapters_rename(order, tmp_path):
    """The head becomes a module of PEFT's, and the layers of the blocks hold the factors of LoRA."""
    strategies = [PEFTConfig(head_lr=None), L2SPConfig(alpha=1.0, beta=2.0)][::order]
    trainer = make_trainer(tiny_vit(), strategies, tmp_path, **{**ONE_STEP, "max_steps": 2, "weight_decay": 0.1})
    run = trainer._start_run()
    start = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    head = [value for name, value in start.items() if "classifier" in name]
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss/task" in entry)
    assert first["loss/l2_sp"] == 0 and second["loss/l2_sp"] > 0
    assert first["loss/l2_head"] == pytest.approx(sum(float(w.square().sum()) for w in head), rel=1e-5)
    assert all(group["weight_decay"] == 0 for group in trainer.optimizer.param_groups)


def test_after_merging_all_but_what_was_frozen_can_be_trained_again(tmp_path):
    model = tiny_resnet()
    model.resnet.embedder.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, "peft", tmp_path, max_steps=2)
    for _ in range(2):
        trainer.train()
        assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == flags


@pytest.mark.parametrize(
    "tuner",
    [LoraConfig(r=2, use_dora=True), IA3Config(feedforward_modules=[]), VeraConfig(r=4), LNTuningConfig()],
    ids=["dora", "ia3", "vera", "ln_tuning"],
)
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_other_tuners(tuner, make, tmp_path):
    base = make()
    config = PEFTConfig(tuner=tuner)
    if make is tiny_resnet and isinstance(tuner, VeraConfig):  # it has linear layers only in its head
        with pytest.raises(OptionError, match="supports an adapter"):
            config.plan(base, State())
        return
    trainer = make_trainer(copy.deepcopy(base), config, tmp_path, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert type(trainer.model) is type(base)
    before, after = snapshot(base), snapshot(trainer.model)
    blocks = [module for block in anatomy(base).blocks for module in block.modules]
    still = [key for key in before if not key.startswith("classifier") and not any(covers(b, key) for b in blocks)]
    same_tensors({key: before[key] for key in still}, {key: after[key] for key in still})
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len([key for key in changed if not key.startswith("classifier")]) >= 3
    norms = [name for name, _ in norm_layers(base)]
    only_norms = all(any(covers(n, key) for n in norms) for key in changed if not key.startswith("classifier"))
    assert only_norms == isinstance(tuner, LNTuningConfig)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_the_example_in_the_help_works(make):
    (field,) = (field for field in dataclasses.fields(PEFTConfig) if field.name == "tuner")
    (example,) = re.findall(r"'(\{.*\})'", field.metadata["help"])
    model = make()
    (surgery,) = PEFTConfig(tuner=tuner_from_json(json.loads(example))).plan(model, State()).surgery
    assert any("ia3" in key for key in surgery(model).state_dict())


def test_targets_that_the_tuner_names_may_be_outside_the_blocks():
    model = tiny_resnet()
    stem = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    (surgery,) = PEFTConfig(tuner=LoraConfig(target_modules=[stem])).plan(model, State()).surgery
    assert surgery.targets == (stem,) and surgery.saved == ("classifier.1",)
    with pytest.raises(OptionError, match="does not adapt modules"):
        PEFTConfig(tuner=PromptTuningConfig(num_virtual_tokens=2)).plan(tiny_bert(), State())
