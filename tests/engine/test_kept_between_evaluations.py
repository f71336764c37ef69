"""Levit's attention caches its biases between evaluation passes: never those of other weights."""

import pytest
import torch
import transformers as hf

from hf_ft import FTTrainer, LPFTConfig
from hf_ft.models.preserve import evaluating
from hf_ft.testing import tiny_inputs
from hf_ft.testing.training import tiny_arguments, tiny_data


def tiny_levit():
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8], "depths": [1, 1, 1]}
    down = {"down_ops": [["Subsample", 8, 2, 4, 2, 2]] * 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LevitForImageClassification(
            hf.LevitConfig(image_size=32, drop_path_rate=0, num_labels=3, **sizes, **down)
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # many are 0, so that the attention does not matter
    return model.eval()


def fresh_loss(model, batch):
    copy = tiny_levit()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(copy(**batch).loss)


@pytest.mark.parametrize("best", [False, True])
def test_evaluation_uses_the_current_weights(best, tmp_path):
    """Also in the stage of LP-FT that trains in eval mode, and after the best weights are loaded."""
    model = tiny_levit()
    batch = tiny_inputs(model, 8, seed=1)
    arguments = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True} if best else {}
    args = tiny_arguments(tmp_path, learning_rate=0.1, eval_strategy="steps", eval_steps=2, **arguments)
    data = {"train_dataset": tiny_data(model, 16), "eval_dataset": tiny_data(model, 8, seed=1)}
    trainer = FTTrainer(model, args, strategy=LPFTConfig(head_lr=1e-3, probe=0.25), **data)
    losses = []
    evaluate = trainer.evaluate

    def both(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        losses.append((metrics["eval_loss"], fresh_loss(model, batch)))
        return metrics

    trainer.evaluate = both
    trainer.train()
    trainer.evaluate()
    assert len(losses) == 5
    for now, fresh in losses:
        assert now == pytest.approx(fresh, rel=1e-5)


def test_a_look_at_the_model_leaves_nothing_behind():
    model, batch = tiny_levit(), tiny_inputs(tiny_levit())
    model.train()
    with evaluating(model), torch.no_grad():
        model(**batch)
    for name, parameter in model.named_parameters():
        if "attention_biases" in name:
            torch.nn.init.normal_(parameter, std=10.0)
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) == pytest.approx(fresh_loss(model, batch), rel=1e-6)
