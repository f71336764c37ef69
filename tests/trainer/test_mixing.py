"""Mixup and CutMix in training: the loss, that it does not depend on how data are read, and what is refused."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, default_data_collator

from hf_ft import FTTrainer, L2SPConfig, OptionError
from hf_ft.core import Needs, TaskLoss
from hf_ft.data.mixing import Mixing, class_shares
from hf_ft.functional import mirrored_probabilities
from hf_ft.models.preserve import random_states
from hf_ft.strategies.co_tuning.config import RelationshipLoss
from hf_ft.testing import same_tensors, tiny_bert, tiny_collaborative, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import equipped, snapshot, tiny_arguments, tiny_data
from hf_ft.trainer.training_batches import TrainingBatches

MIXED = {"mixup": 0.4, "cutmix": 1.0}


def trainer(folder, model=None, strategy="full", samples=24, data=None, callbacks=(), compute_loss_func=None, **more):
    model = tiny_resnet() if model is None else model
    ours = {name: more.pop(name) for name in ("mixup", "cutmix", "class_weights", "frozen_cache") if name in more}
    return FTTrainer(
        equipped(model, strategy),
        tiny_arguments(folder, **more),
        strategy=strategy,
        train_dataset=tiny_data(model, samples) if data is None else data,
        eval_dataset=tiny_data(model, 8, seed=1) if data is None else None,
        callbacks=list(callbacks),
        compute_loss_func=compute_loss_func,
        **ours,
    )


# --- the loss -----------------------------------------------------------------------------------------------


def in_float64(logits, one, other, share, weights=None, smoothing=0.0):
    """lam CE(z, y_a) + (1 - lam) CE(z, y_b), row by row, with weights w_y; smoothing gives every class a share."""
    total, classes = 0.0, logits.shape[1]
    for row, a, b in zip(logits.double(), one.tolist(), other.tolist(), strict=True):
        log_p = row - row.exp().sum().log()

        def loss(y, log_p=log_p):
            weight = 1.0 if weights is None else float(weights[y])
            return weight * float(-(1 - smoothing) * log_p[y] - smoothing * log_p.sum() / classes)

        total += share * loss(a) + (1 - share) * loss(b)
    return total / len(logits)


@pytest.mark.parametrize("kind", ["plain", "weights", "smoothing", "function"])
@pytest.mark.parametrize("model", [tiny_resnet, tiny_vit])
def test_the_loss_of_mixed_labels(model, kind, tmp_path):
    model = model().eval()
    model.config.problem_type = "single_label_classification"
    classes, share = model.config.num_labels, 0.3
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([0, 1, 2, 0, 1, 2]) % classes, torch.tensor([1, 1, 0, 2, 2, 0]) % classes
    weights = torch.linspace(0.5, 1.5, classes)
    options = {
        "plain": {},
        "weights": {"class_weights": weights},
        "smoothing": {"label_smoothing_factor": 0.1},
        "function": {"compute_loss_func": lambda o, y, num_items_in_batch: ce_sum(o, y) / num_items_in_batch},
    }[kind]
    task_loss = trainer(tmp_path, model, **options).task_loss
    if kind == "weights":
        weights = task_loss.class_weights
    labels = share * class_shares(one, classes) + (1 - share) * class_shares(other, classes)
    loss, outputs = task_loss(model, {"pixel_values": images, "labels": labels})
    expected = in_float64(
        outputs["logits"].detach(),
        one,
        other,
        share,
        weights if kind == "weights" else None,
        0.1 if kind == "smoothing" else 0.0,
    )
    loss = loss.detach()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    hard = [task_loss(model, {"pixel_values": images, "labels": y})[0] for y in (one, other)]
    assert float(loss) == pytest.approx(float((share * hard[0] + (1 - share) * hard[1]).detach()), rel=1e-5)


def ce_sum(outputs, labels):
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")


def test_an_ensemble_sums_the_losses_of_its_members():
    model = tiny_collaborative().eval()
    model.config.problem_type = "single_label_classification"
    inputs = tiny_inputs(model, 5)
    one, other = inputs.pop("labels"), torch.tensor([2, 1, 0, 0, 1])
    losses = [
        TaskLoss()(model, {**inputs, "labels": labels})[0].detach()
        for labels in (one, other, 0.2 * class_shares(one, 3) + 0.8 * class_shares(other, 3))
    ]
    assert torch.allclose(losses[2], 0.2 * losses[0] + 0.8 * losses[1])


def test_a_relationship_of_classes_is_mixed_like_the_classes():
    """Co-Tuning's soft source labels, for mixed target classes."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    term = RelationshipLoss(None, torch.rand(3, 7).softmax(1))
    one, other = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])

    def loss(labels):
        return term(SimpleNamespace(batch={"labels": labels}, source_logits=lambda head: logits))

    shares = 0.7 * class_shares(one, 3) + 0.3 * class_shares(other, 3)
    assert torch.allclose(loss(shares), 0.7 * loss(one) + 0.3 * loss(other))


def test_mirrored_probabilities():
    weights = torch.randn(3 * 4 * 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = mirrored_probabilities(lambda x: x.flatten(1) @ weights, images)
    for row, image in zip(found, images, strict=True):
        views = (image, torch.from_numpy(image.numpy()[:, :, ::-1].copy()))
        expected = sum((view.flatten() @ weights).exp() / (view.flatten() @ weights).exp().sum() for view in views) / 2
        assert torch.allclose(row, expected)
    assert torch.allclose(found, mirrored_probabilities(lambda x: x.flatten(1) @ weights, images.flip(-1)))


def test_rows_without_a_label_do_not_count():
    model = tiny_resnet().eval()
    model.config.problem_type = "single_label_classification"
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, -100, 0])
    losses = [
        TaskLoss()(model, {"pixel_values": images, "labels": y})[0]
        for y in (labels, class_shares(labels, model.config.num_labels))
    ]
    assert torch.allclose(*losses)


KINDS = {
    "multi_label_classification": [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
    "regression": [[0.5], [2.0], [-1.0], [3.25]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_numbers_are_mixed_themselves(kind, tmp_path):
    given = torch.tensor(KINDS[kind])
    model = tiny_resnet(num_labels=given.shape[1])
    model.config.problem_type = kind
    rows = [{"pixel_values": torch.full((3, 32, 32), float(k)), "labels": y} for k, y in enumerate(given)]
    made = trained(trainer(tmp_path, model, data=rows, mixup=1.0, max_steps=1, per_device_train_batch_size=4))
    batch = next(iter(made.get_train_dataloader()))
    # Pixels are multiples of the row's number, so they show which labels were mixed: all are linear in it here.
    one, share, partners = matched(batch["pixel_values"][:, 0, 0, 0])
    expected = share * given[one] + (1 - share) * given[partners]
    assert torch.allclose(batch["labels"].reshape(4, -1), expected, atol=1e-5) and 0 < share < 1


def matched(values):
    """Rows, share and partners with share * row + (1 - share) * partner = value; rows are a permutation of 0 to 3."""
    for one in itertools.permutations(range(4)):
        for two in itertools.permutations(range(4)):
            a, b = torch.tensor(one, dtype=torch.float), torch.tensor(two, dtype=torch.float)
            places = (a != b).nonzero().flatten()
            if len(places):
                k = int(places[0])
                share = float((values[k] - b[k]) / (a[k] - b[k]))
                if 0 < share < 1 and torch.allclose(share * a + (1 - share) * b, values, atol=1e-5):
                    return list(one), share, list(two)
    raise AssertionError(values)


def trained(made, resume=None):
    made.train(resume_from_checkpoint=resume)
    return made


# --- the batches --------------------------------------------------------------------------------------------


def constant(rows=6, side=20):
    """Images whose pixels all equal the number of their row."""
    images = torch.arange(float(rows))[:, None, None, None].expand(rows, 3, side, side)
    return {"pixel_values": images.contiguous(), "labels": torch.arange(rows) % 3}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_the_shares_of_the_pixels(kind):
    mixing, given, shares = Mixing(**{kind: 1.0}), constant(), set()
    for seed in range(30):
        batch = mixing(given, 3, seed)
        assert torch.allclose(batch["labels"].sum(1), torch.ones(6))
        # The mean of the pixels is share * row + (1 - share) * partner, like that of the labels' classes.
        means = batch["pixel_values"].mean((1, 2, 3))
        seen = [round(float(s), 4) for s in batch["labels"].max(1).values]
        shares.update(seen)
        pairs = [(i, j) for i in range(6) for j in range(6)]
        for row, mean in enumerate(means):
            fits = [
                (i, j)
                for i, j in pairs
                if i == row
                and any(
                    torch.allclose(s * one_hot(i) + (1 - s) * one_hot(j), batch["labels"][row], atol=1e-4)
                    and abs(s * i + (1 - s) * j - float(mean)) < 1e-3
                    for s in candidates(batch["labels"][row], i, j, float(mean))
                )
            ]
            assert fits, (seed, row, mean, batch["labels"][row])
        if kind == "cutmix":
            assert all(len(image.unique()) <= 2 for image in batch["pixel_values"])
    assert len(shares) > 20
    assert torch.equal(given["pixel_values"], constant()["pixel_values"])  # it is not changed in place


def one_hot(row):
    return torch.nn.functional.one_hot(torch.tensor(row % 3), 3).float()


def candidates(labels, i, j, mean):
    return [1.0] if i == j else [(mean - j) / (i - j)]


def test_lambda_follows_beta():
    """For alpha = 0.2, mean 1/2 and variance 1 / (4 (2 alpha + 1)); with alpha = 1 it is uniform."""
    for alpha in (0.2, 1.0):
        given = {"pixel_values": torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1), "labels": torch.tensor([0, 1])}
        drawn = [Mixing(mixup=alpha)(given, 2, seed) for seed in range(1000)]
        share = torch.stack([batch["labels"][0, 0] for batch in drawn if batch["labels"][0, 1] > 0])
        assert share.mean() == pytest.approx(0.5, abs=0.05)
        assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_both_take_turns_and_members_of_an_ensemble_get_the_same_box():
    given = constant() | {"pixel_values_1": constant(side=40)["pixel_values"]}
    cut = 0
    for seed in range(40):
        batch = Mixing(mixup=1.0, cutmix=1.0)(given, 3, seed)
        small, large = batch["pixel_values"], batch["pixel_values_1"]
        pasted = all(len(image.unique()) <= 2 for image in small) and bool((small == small.round()).all())
        cut += pasted
        assert torch.allclose(small.mean((1, 2, 3)), large.mean((1, 2, 3)), atol=0.5)
        if not pasted:
            assert torch.equal(small[..., 0, 0], large[..., 0, 0])
    assert 10 < cut < 30


# --- the same wherever a run is interrupted -----------------------------------------------------------------


def collator(epoch=0, seed=3):
    data = tiny_data(tiny_resnet(), 24)
    return TrainingBatches(data, default_data_collator, seed, torch.tensor(epoch), False, Mixing(**MIXED), 3)


def batches(rows, workers=0, **more):
    made = collator(**more)
    return list(torch.utils.data.DataLoader(range(24), batch_sampler=rows, collate_fn=made, num_workers=workers))


def test_a_batch_is_mixed_alike_in_every_process():
    rows = [[3, 1, 4, 5], [9, 2, 6, 8], [7, 0, 11, 10]]
    whole, states = batches(rows), random_states()
    collator()(rows[0])
    assert random_states() == states
    for other in (batches(rows, workers=2), batches(rows[1:])):
        for one, two in zip(whole[-len(other) :], other, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
    for other in (batches(rows, epoch=1), batches(rows, seed=4)):
        assert not any(torch.equal(one["labels"], two["labels"]) for one, two in zip(whole, other, strict=True))


# An epoch has 3 steps of two micro-batches each: checkpoint-2 is within it.
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_within_an_epoch(workers, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "dataloader_num_workers": workers}
    more |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **MIXED}
    whole = trained(trainer(tmp_path / "whole", **more))
    resumed = trained(trainer(tmp_path / "again", **more), str(tmp_path / "whole" / "checkpoint-2"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    plain = trained(trainer(tmp_path / "plain", **more | {"mixup": 0.0, "cutmix": 0.0}))
    assert not torch.equal(*(t.model.classifier[-1].weight for t in (plain, whole)))


# --- what it can be combined with ---------------------------------------------------------------------------


def test_measurements_and_evaluation_see_unmixed_images(tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    made = trained(trainer(tmp_path, callbacks=[Looks()], eval_strategy="epoch", max_steps=3, **MIXED))
    labels = torch.cat([batch["labels"] for batch in made.context().batches()])
    assert labels.dtype == torch.int64 and made.context().samples.read([0, 1])["labels"].dtype == torch.int64
    assert seen[-1] == pytest.approx(trainer(tmp_path, made.model).evaluate()["eval_loss"])


def test_a_frozen_part_is_computed_in_every_step_and_a_log_line_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "hf_ft.trainer.stage_cache")
    for more, recorded in ((MIXED, False), ({}, True)):
        made = trainer(tmp_path, strategy="linear_probe", max_steps=9, **more)
        seen = []
        made.add_callback(Prefix(made, seen))
        made.train()
        assert seen[-1] is recorded
    said = [r.getMessage() for r in caplog.records if "are mixed" in r.getMessage()]
    assert said == ["Batches are mixed (mixup=0.4, cutmix=1): the frozen part is computed in every step."]


class Prefix(TrainerCallback):
    def __init__(self, made, seen):
        self.made, self.seen = made, seen

    def on_step_end(self, *args, **kwargs):
        self.seen.append(self.made._attempt.objective.prefix is not None)


class Focal(type(tiny_resnet())):
    """A model with its own loss, which only supports classes."""

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels=labels)
        return outputs if labels is None else {"loss": outputs.loss**2, "logits": outputs.logits}


def of_class(kind):
    model = tiny_resnet()
    model.__class__ = kind
    return model


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


REFUSED = {
    "a negative alpha": ({"mixup": -0.1}, "mixup=-0.1 must be 0, for none, or a positive number, such as 0.2"),
    "no number": ({"cutmix": float("nan")}, "cutmix=nan must be 0"),
    "text": ({"model": tiny_bert, "mixup": 0.2}, "mixup=0.2: only images can be mixed, but Bert.*'input_ids'"),
    "rows that stream": ({"data": Endless(), "mixup": 0.2, "max_steps": 2}, "mixup=0.2: .*iterable train_dataset"),
    "recorded rows": ({"frozen_cache": "always", "mixup": 0.2}, "frozen_cache='always'.*mixup=0.2.*Use 'auto'"),
    "a loss of its own": ({"model": lambda: of_class(Focal), "cutmix": 1.0}, "cutmix=1: the model computes .* for cl"),
    "a loss of classes": (
        {"compute_loss_func": lambda o, y, num_items_in_batch: -o["logits"].gather(1, y[:, None]).mean(), "mixup": 0.2},
        "mixup=0.2: compute_loss_func computes no loss for shares of classes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    given, message = REFUSED[case]
    model = given.get("model", tiny_resnet)()
    with pytest.raises(OptionError, match=message):
        trainer(tmp_path, **{**given, "model": model}).train()


def test_a_strategy_that_needs_classes_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(L2SPConfig, "needs", lambda self: Needs(hard_labels=True))
    with pytest.raises(OptionError, match="cutmix=1: l2_sp needs the class of each sample.*Set cutmix=0"):
        trainer(tmp_path, strategy=["lp_ft", "l2_sp"], cutmix=1.0)
    trainer(tmp_path, strategy="l2_sp")


def test_the_model_card_reports_it(tmp_path):
    made = trained(trainer(tmp_path, max_steps=1, cutmix=1.0))
    made.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| cutmix | `1.0` |" in card and "mixup" not in card
