"""Classifiers that return no loss, or logits of another form, train and score like any other."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from hf_ft import DELTAConfig, FTTrainer, LinearProbeConfig, OptionError
from hf_ft.core.task_loss import TaskLoss
from hf_ft.metrics import compute_metrics
from hf_ft.testing import same_tensors, tiny_inputs, tiny_vit
from hf_ft.testing.training import snapshot, tiny_arguments, tiny_data


class NoLoss(hf.ViTForImageClassification):
    """Takes no labels, like ``DeiTForImageClassificationWithTeacher``."""

    def forward(self, pixel_values):
        return {"logits": super().forward(pixel_values).logits}


class NoLogits(hf.ViTForImageClassification):
    """Names its logits differently and ignores labels, like ``PPLCNetForImageClassification``."""

    def forward(self, pixel_values, **kwargs):
        return {"last_hidden_state": super().forward(pixel_values).logits}


class OneToken(hf.ViTForImageClassification):
    """Logits (B, 1, C)."""

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels=labels)
        return {"loss": outputs.loss, "logits": outputs.logits[:, None]}


class OneTokenAlone(OneToken):
    def forward(self, pixel_values):
        return {"logits": super().forward(pixel_values)["logits"]}


LBFGS, DELTA = LinearProbeConfig(probe_solver="lbfgs"), DELTAConfig(head_epochs=1)
ODD = [NoLoss, NoLogits, OneToken, OneTokenAlone]


def made(kind, **fields):
    model = tiny_vit(**fields)
    model.__class__ = kind
    return model


@pytest.mark.parametrize(("kind", "strategy"), zip(ODD, [DELTA, "full", LBFGS, DELTA], strict=True))
def test_it_trains_and_scores_like_the_model_itself(kind, strategy, tmp_path):
    found = []
    for each in (hf.ViTForImageClassification, kind):
        model = made(each)
        evaluated = tiny_data(model, 16, seed=1)
        args = tiny_arguments(tmp_path, max_steps=3)
        data = {"train_dataset": tiny_data(model, 16), "eval_dataset": evaluated}
        trainer = FTTrainer(model, args, strategy=strategy, compute_metrics=compute_metrics(["accuracy"]), **data)
        trainer.train()
        scores = trainer.evaluate()
        predictions = trainer.predict(evaluated).predictions
        assert predictions.shape == (16, 3)
        found.append((snapshot(model), scores["eval_accuracy"], scores["eval_loss"], predictions.tolist()))
    same_tensors(found[0][0], found[1][0], 1e-6)
    assert found[0][1:3] == pytest.approx(found[1][1:3], abs=1e-6)


LABELS = {
    "single_label_classification": torch.tensor([0, 2, 1, 1]),
    "multi_label_classification": torch.tensor([[0.0, 1.0, 1.0]] * 4),
    "regression": torch.tensor([[0.1, 2.0, -1.0]] * 4),
}


@pytest.mark.parametrize("problem_type", LABELS)
@pytest.mark.parametrize("kind", ODD)
def test_the_loss_is_that_of_the_problem_type(kind, problem_type):
    batch = {**tiny_inputs(tiny_vit()), "labels": LABELS[problem_type]}
    own = tiny_vit(problem_type=problem_type)(**batch).loss
    torch.testing.assert_close(TaskLoss()(made(kind, problem_type=problem_type), batch)[0], own)


@pytest.mark.parametrize("kind", [hf.DeiTForImageClassificationWithTeacher, hf.PPLCNetForImageClassification])
def test_classes_of_transformers_without_a_loss(kind, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    small = {"scale": 0.25, "class_expand": 32} if kind is hf.PPLCNetForImageClassification else small
    model = kind(kind.config_class(num_labels=3, **small))
    data = tiny_data(model, 16)
    args = tiny_arguments(tmp_path, max_steps=2)
    trainer = FTTrainer(model, args, strategy="linear_probe", train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


class Bare(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return copy.copy(self.outputs)


def test_what_cannot_be_scored_gives_one_message():
    batch = {"x": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(OptionError, match="Bare returns neither a loss nor logits, only .'states'.*compute_loss_func"):
        TaskLoss()(Bare({"states": torch.zeros(4, 5)}), batch)
    with pytest.raises(OptionError, match=r"\(4, 5, 3\) do not fit labels of shape \(4,\).*compute_loss_func"):
        TaskLoss()(Bare({"logits": torch.zeros(4, 5, 3)}), batch)
    loss, outputs = TaskLoss()(Bare({"logits": torch.zeros(4, 3)}), {"x": batch["x"]})
    assert loss is None and outputs["logits"].shape == (4, 3)
