"""Its recommendations are the defaults of TrainingArguments, and it trains like the stock Trainer."""

import torch
from transformers import Trainer, TrainingArguments

from hf_ft import StockConfig
from hf_ft.testing import same_tensors, tiny_data, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments


def test_its_arguments_are_the_defaults(tmp_path):
    args = TrainingArguments(str(tmp_path))
    for name, wanted in StockConfig.recommended.items():
        default = getattr(args, name)
        # Fused or not, AdamW takes the same steps up to rounding.
        assert str(getattr(default, "value", default)).removesuffix("_fused") == str(wanted.value)


def test_it_is_the_stock_trainer(tmp_path):
    ours, theirs = tiny_vit(), tiny_vit()
    make_trainer(ours, "stock", tmp_path / "ours", learning_rate=5e-5).train()
    before = snapshot(theirs)
    Trainer(theirs, tiny_arguments(tmp_path, learning_rate=5e-5), train_dataset=tiny_data(theirs)).train()
    same_tensors(snapshot(ours), snapshot(theirs))
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(theirs).items())


def test_it_decays_linearly_whatever_the_schedule_of_a_comparison(tmp_path, caplog):
    ours, theirs = tiny_vit(), tiny_vit()
    make_trainer(
        ours, "stock", tmp_path / "ours", learning_rate=5e-5, lr_scheduler_type="cosine", warmup_steps=2
    ).train()
    Trainer(theirs, tiny_arguments(tmp_path, learning_rate=5e-5), train_dataset=tiny_data(theirs)).train()
    same_tensors(snapshot(ours), snapshot(theirs))
    assert "stock: lr_scheduler_type='cosine', warmup_steps=2 has no effect in the stages train" in caplog.text
