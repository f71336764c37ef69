"""BSS: the formula on every architecture, in half precision, and if there is nothing to shrink."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from hf_ft import BSSConfig, OptionError, State, set_up
from hf_ft.testing import TINY_MODELS, same_tensors, still, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, snapshot
from tests.models.heads import headed, padded, without_labels


def features_of(model, batch):
    """The input of the last linear layer, or of the layer before it, found independently of the package."""
    seen = []
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    name = type(model).__name__
    layer = head[-2] if name.startswith(("Roberta", "Distil")) else head[-1]
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_term_is_the_formula(name, k):
    model = still(TINY_MODELS[name]())
    batch = tiny_inputs(model, 6)
    objective = set_up(model, BSSConfig(eta=0.5, k=k, batch_norm_momentum="keep")).objective().train()
    model.eval()
    values = np.linalg.svd(features_of(model, batch).double().numpy(), compute_uv=False)
    outputs = objective(**batch)
    energy = float((values**2).sum())
    assert outputs["terms"]["bss"].item() == pytest.approx(0.5 * float((values[-k:] ** 2).sum()), abs=1e-6 * energy)


def test_accumulated_batches_are_each_shrunk(tmp_path):
    """The loss of two micro-batches is the mean of theirs, each with its own singular values."""
    arguments = {"optim": "sgd", "max_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = make_trainer(
        still(tiny_vit()), BSSConfig(eta=0.3), tmp_path, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, **arguments,
    )  # fmt: skip
    rows = []
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: rows.append(collate(batch)) or rows[-1]
    trainer.train()
    model = still(tiny_vit())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(2):
        for batch in rows[2 * step : 2 * step + 2]:
            outputs = model(**batch, output_hidden_states=True)
            features = model.vit.layernorm(outputs.hidden_states[-1])[:, 0]
            ((outputs.loss + 0.3 * torch.linalg.svdvals(features)[-1] ** 2) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    same_tensors(snapshot(trainer.model), snapshot(model), 1e-6)


class Same(torch.utils.data.Dataset):
    """The same sample again and again."""

    def __len__(self):
        return 32

    def __getitem__(self, row):
        return {name: column[0] for name, column in tiny_inputs(tiny_resnet(), 1).items()}


def warnings_of_zero(caplog):
    return [record for record in caplog.records if "exactly 0 since the last log" in record.getMessage()]


def logged_bss(trainer):
    return [entry["loss/bss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="hf_ft")
    return caplog


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_equal_rows_give_zero_and_one_warning(make, tmp_path, told):
    trainer = make_trainer(still(make()), BSSConfig(eta=1.0), tmp_path)
    trainer.train_dataset = Same()
    trainer.train()
    assert logged_bss(trainer) == [0.0] * 8 and len(warnings_of_zero(told)) == 1
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_constant_features_give_zero_and_one_warning(tmp_path, told):
    model = tiny_vit()
    with torch.no_grad():
        model.vit.layernorm.weight.zero_()
        model.vit.layernorm.bias.fill_(0.5)
    model.vit.layernorm.requires_grad_(False)
    trainer = make_trainer(model, BSSConfig(eta=1.0), tmp_path)
    trainer.train()
    assert logged_bss(trainer) == [0.0] * 8 and len(warnings_of_zero(told)) == 1


def test_a_last_batch_of_one_is_left_alone(tmp_path, told):
    trainer = make_trainer(tiny_vit(), BSSConfig(eta=1.0), tmp_path, max_steps=4)
    trainer.train_dataset = trainer.train_dataset.select(range(9))
    trainer.train()
    assert [value == 0.0 for value in logged_bss(trainer)] == [False, True, False, True]
    assert len(warnings_of_zero(told)) == 1


def test_settings_that_can_never_work(tmp_path):
    with pytest.raises(OptionError, match="per_device_train_batch_size=1 with bss.k=1"):
        make_trainer(tiny_resnet(), "bss", tmp_path / "out", per_device_train_batch_size=1)
    with pytest.raises(OptionError, match="smaller k"):
        make_trainer(tiny_resnet(), BSSConfig(k=8), tmp_path / "out", per_device_train_batch_size=8)
    assert not (tmp_path / "out").exists()
    assert BSSConfig(eta=0.0).plan(tiny_resnet(), State()).terms == ()


def pooled_by_hand(model, name, batch):
    """What the model pools from the states before the layer that gives the logits, from its hidden states."""
    inputs = without_labels(batch, torch.float64)
    if name == "timesformer":
        return model.timesformer(**inputs)[0][:, 0]
    states = model.base_model(**inputs)[0]
    if name == "wav2vec2":
        frames = [((length - 10) // 5 + 1 - 4) // 4 + 1 for length in inputs["attention_mask"].sum(1).tolist()]
        return torch.stack([model.projector(row[:count]).mean(0) for row, count in zip(states, frames, strict=True)])
    return states[torch.arange(4), inputs["attention_mask"].sum(1) - 1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "wav2vec2", "timesformer"])
def test_heads_per_token(name):
    """Tokens are pooled like in the model: the value equals float64's, however much padding the batch has."""
    model = still(headed(name))
    batch = padded(name)
    with torch.no_grad():
        features = pooled_by_hand(copy.deepcopy(model).double(), name, batch).numpy()
    values = np.linalg.svd(features, compute_uv=False)
    expected = 0.5 * float((values[-2:] ** 2).sum())
    assert expected > 1e-4
    objective = set_up(model, BSSConfig(eta=0.5, k=2)).objective().train()
    model.eval()
    for more in (0, 3) if name != "timesformer" else (0,):
        outputs = objective(**padded(name, more))
        assert outputs["terms"]["bss"].item() == pytest.approx(expected, rel=1e-3)
    outputs["loss"].backward()
    assert all(parameter.grad is not None for parameter in list(model.parameters())[-8:])


def test_heads_per_token_on_recorded_features(tmp_path):
    """A probe's stage runs on recorded states, with the same weights as without them."""
    found = []
    for cache in ("never", "always"):
        config = BSSConfig(eta=0.5)
        trainer = make_trainer(still(headed("gpt2")), ["linear_probe", config], tmp_path / cache, frozen_cache=cache)
        trainer.train()
        assert trainer.state.log_history[0]["loss/bss"] > 0
        found.append(snapshot(trainer.model))
    same_tensors(*found, 1e-6)


def test_the_error_for_a_head_that_takes_tokens(tmp_path):
    model = tiny_vit()
    model.classifier = nn.Sequential(nn.Identity(), nn.Linear(16, 3))
    forward = model.forward

    def tokens(pixel_values, labels=None, **kwargs):
        states = model.vit(pixel_values).last_hidden_state
        logits = model.classifier(states)
        loss = None if labels is None else nn.functional.cross_entropy(logits.mean(dim=1), labels)
        return {"loss": loss, "logits": logits}

    model.forward = tokens
    with pytest.raises(OptionError, match=r"bss: the head's input is \(8, 17, 16\).*head="):
        train(model, "bss", tmp_path)
    assert forward is not None
