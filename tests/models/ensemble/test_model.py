"""An ensemble as one model: what it computes, and that its files are those of plain models."""

import copy
import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from torch import nn
from torch.nn import functional

from hf_ft import CheckpointError, FTTrainer, OptionError, load_delta, load_weights, zoo
from hf_ft.core.compose import resolve
from hf_ft.engine.checkpoint import digests
from hf_ft.engine.checkpoint_folders import is_complete, seal
from hf_ft.engine.deltas import save_delta
from hf_ft.models.ensemble.config import CollaborativeConfig
from hf_ft.models.ensemble.model import CollaborativeModel, joint_logits
from hf_ft.testing import same_tensors, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.models import tiny_distilbert, tiny_efficientnet, tiny_mobilenet_v2, tiny_swin, tiny_timm
from hf_ft.testing.training import snapshot, tiny_arguments
from hf_ft.trainer.model_card import model_card
from tests.forked import python

CLASSES = 3


def ensemble(**options):
    """A ResNet, a ViT that reads another tensor, and a MobileNetV2."""
    options = {"inputs": [0, 1, 0], **options}
    return CollaborativeModel.from_members([tiny_resnet(), tiny_vit(), tiny_mobilenet_v2()], **options)


def images(batch=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (batch,), generator=random)
    first, second = (torch.randn(batch, 3, 32, 32, generator=random) for _ in range(2))
    return {"pixel_values": first, "pixel_values_1": second, "labels": labels}


def by_hand(model, batch):
    """Each member of :func:`ensemble` on its own."""
    columns = ("pixel_values", "pixel_values_1", "pixel_values")
    members = zip(model.members, columns, strict=True)
    return [member(pixel_values=batch[column], labels=batch["labels"]) for member, column in members]


# --- what it computes ---------------------------------------------------------------------------------------


def test_each_member_reads_its_own_input_and_learns_by_its_own_loss():
    model, batch = ensemble(), images()
    alone = by_hand(model, batch)
    outputs = model(**batch)
    assert len(outputs.member_logits) == 3
    assert all(torch.equal(one, other.logits) for one, other in zip(outputs.member_logits, alone, strict=True))
    assert torch.equal(outputs.logits, alone[0].logits + alone[1].logits + alone[2].logits)
    assert torch.equal(outputs.loss, alone[0].loss + alone[1].loss + alone[2].loss)
    assert "loss" not in model(pixel_values=batch["pixel_values"], pixel_values_1=batch["pixel_values_1"])
    outputs.loss.backward()
    weight = model.members[1].classifier.weight
    (wanted,) = torch.autograd.grad(by_hand(model, batch)[1].loss, weight)
    assert torch.equal(weight.grad, wanted)


def test_text_members_take_the_tensors_that_they_know():
    bert, distilbert = tiny_bert(), tiny_distilbert()
    model = CollaborativeModel.from_members([bert, tiny_bert(seed=1), distilbert], inputs=[0, 1, 1])
    first, second = tiny_inputs(bert), tiny_inputs(bert, seed=1)
    labels = first.pop("labels")
    second = {name: tensor[:, :6] for name, tensor in second.items() if name != "labels"}
    first["token_type_ids"], second["token_type_ids"] = (torch.ones_like(x["input_ids"]) for x in (first, second))
    batch = {**first, **{f"{name}_1": tensor for name, tensor in second.items()}, "labels": labels}
    outputs = model(**batch)
    without = {name: tensor for name, tensor in second.items() if name != "token_type_ids"}
    alone = [bert(**first, labels=labels), model.members[1](**second, labels=labels), distilbert(**without)]
    assert all(torch.equal(one, other.logits) for one, other in zip(outputs.member_logits, alone, strict=True))
    assert model.main_input_name == "input_ids" and model.config.task == "text"
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert model.input_names == (*names, *(f"{name}_1" for name in names))


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_against_float64(dtype):
    random = np.random.default_rng(0)
    logits = random.normal(scale=3.0, size=(3, 5, 4)).astype(np.float32).astype(np.float64)
    given = [torch.tensor(member, dtype=dtype) for member in logits]
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    single, several = "single_label_classification", "multi_label_classification"
    np.testing.assert_allclose(joint_logits(given, "sum", single), logits.sum(0), **close)
    np.testing.assert_allclose(joint_logits(given, "sum", several), logits.sum(0), **close)
    mean = joint_logits(given, "mean_probability", single)
    np.testing.assert_allclose(mean, np.log(softmax(logits).mean(0)), **close)
    np.testing.assert_allclose(mean.softmax(-1), softmax(logits).mean(0), **close)
    odds = sigmoid(logits).mean(0) / (1 - sigmoid(logits).mean(0))
    np.testing.assert_allclose(joint_logits(given, "mean_probability", several), np.log(odds), **close)
    for prediction in ("sum", "mean_probability"):
        np.testing.assert_allclose(joint_logits(given, prediction, "regression"), logits.mean(0), **close)


def test_mean_probability_is_stable():
    far = [torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, 0.0]])]
    single = joint_logits(far, "mean_probability", "single_label_classification")
    assert single[0, 0] == 0 and single[0, 1] == pytest.approx(-1e4 - math.log(2))
    several = joint_logits(far, "mean_probability", "multi_label_classification")
    assert several[0, 0] == pytest.approx(1e4, rel=1e-3)
    assert several[0, 1] == pytest.approx(math.log(0.25 / 0.75), rel=1e-5)  # sigmoids 0 and 0.5
    half = joint_logits([x.half() for x in far], "mean_probability", "single_label_classification")
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_both_predictions_share_the_loss():
    batch = images()
    outputs = [ensemble(prediction=prediction)(**batch) for prediction in ("sum", "mean_probability")]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    probabilities = torch.stack([logits.softmax(-1) for logits in outputs[1].member_logits]).mean(0)
    torch.testing.assert_close(outputs[1].logits.softmax(-1), probabilities)


LOSSES = {
    "single_label_classification": functional.cross_entropy,
    "multi_label_classification": functional.binary_cross_entropy_with_logits,
    "regression": functional.mse_loss,
}


def labels_for(problem_type, batch=4):
    random = torch.Generator().manual_seed(1)
    if problem_type == "single_label_classification":
        return torch.randint(CLASSES, (batch,), generator=random)
    return torch.rand(batch, CLASSES, generator=random).round()


@pytest.mark.parametrize("problem_type", LOSSES)
def test_problem_type_of_the_ensemble_is_that_of_its_members(problem_type):
    model = ensemble(prediction="mean_probability")
    model(**images())  # members remember what their labels look like
    model.config.problem_type = problem_type
    labels = labels_for(problem_type)
    outputs = model(**images() | {"labels": labels})
    wanted = sum(LOSSES[problem_type](logits, labels) for logits in outputs.member_logits)
    torch.testing.assert_close(outputs.loss, wanted)
    assert torch.equal(outputs.logits, joint_logits(outputs.member_logits, "mean_probability", problem_type))


def test_problem_type_is_inferred_from_labels_as_by_any_classifier():
    several = ensemble(prediction="mean_probability")
    several(**images() | {"labels": labels_for("multi_label_classification")})
    assert several.config.problem_type == "multi_label_classification"
    one = CollaborativeModel.from_members([tiny_resnet(1), tiny_vit(1)])
    outputs = one(pixel_values=images()["pixel_values"])
    assert torch.equal(outputs.logits, torch.stack(outputs.member_logits).mean(0))


def test_inputs_and_options_go_where_they_are_known():
    model, batch = ensemble(), images()
    assert model.input_names == ("pixel_values", "pixel_values_1") and model.main_input_name == "pixel_values"
    with pytest.raises(OptionError, match="member 1 needs 'pixel_values_1', but the inputs are .'pixel_values'"):
        model(pixel_values=batch["pixel_values"])
    larger = torch.randn(2, 3, 48, 48)  # which only the ViT needs
    outputs = model(pixel_values=batch["pixel_values"][:2], pixel_values_1=larger, interpolate_pos_encoding=True)
    wanted = model.members[1](larger, interpolate_pos_encoding=True).logits
    assert torch.equal(outputs.member_logits[1], wanted)
    loss, logits, members = model(**batch, return_dict=False)
    assert torch.equal(loss, model(**batch).loss) and logits.shape == (4, CLASSES) and len(members) == 3


def test_given_modules_are_the_members():
    members = [tiny_resnet(), tiny_vit()]
    members[0].resnet.embedder.requires_grad_(False)
    head = members[0].classifier[1] = nn.Linear(16, CLASSES)
    before = snapshot(nn.ModuleList(members))
    model = CollaborativeModel.from_members(members)
    assert model.members[0] is members[0] and model.members[1] is members[1] and not model.training
    same_tensors(snapshot(nn.ModuleList(members)), before)
    assert members[0].classifier[1] is head
    assert not any(parameter.requires_grad for parameter in members[0].resnet.embedder.parameters())
    assert model.train().members[1].training and model.half().dtype == torch.float16
    assert CollaborativeModel.from_members([tiny_vit().train()]).training


def test_a_copy_is_independent():
    model, batch = ensemble(), images()
    twin = copy.deepcopy(model)
    wanted = twin(**batch).logits
    nn.init.zeros_(model.members[0].classifier[1].weight)
    assert torch.equal(twin(**batch).logits, wanted) and not torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize("make", [tiny_vit, tiny_bert])
def test_gradient_checkpointing_where_members_have_it(make):
    members = [make(), make(seed=1)] if make is tiny_bert else [tiny_resnet(), make()]
    model = CollaborativeModel.from_members(members).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = tiny_inputs(members[1])
    model(**batch).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in members[1].modules())
    model(**batch).loss.backward()
    same_tensors({name: parameter.grad for name, parameter in model.named_parameters()}, wanted, 1e-6)
    with pytest.raises(ValueError, match="does not support"):
        CollaborativeModel.from_members([tiny_resnet()]).gradient_checkpointing_enable()


NAMED = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: [], {}, "members is empty"),
        (
            lambda: [tiny_resnet(), tiny_vit(4)],
            {},
            r"member 0 \(ResNet.*num_labels=3, but member 1 \(ViT.*num_labels=4",
        ),
        (lambda: [tiny_resnet(), tiny_vit(**NAMED)], {}, r"calls class 0 'LABEL_0', but member 1 .* calls it 'cat'"),
        (lambda: [tiny_vit(), tiny_bert()], {}, r"member 0 \(ViT.* is for image, but member 1 \(Bert.* for text"),
        (lambda: [tiny_vit(), ensemble()], {}, r"member 1 \(Collab.* is itself an ensemble: give its members"),
        (lambda: [nn.Linear(2, 2)], {}, r"member 0 \(Linear\) is not a Transformers model with a config"),
        (lambda: [tiny_timm()], {}, r"member 0 \(TimmLike.* is not a classifier that AutoModelForImageClassification"),
        (lambda: [tiny_vit()] * 2, {}, r"member 1 \(ViT.* occurs twice: give a copy"),
        (
            lambda: [tiny_vit(problem_type="regression"), tiny_vit(problem_type="multi_label_classification")],
            {},
            r"member 0 .* has 'regression', member 1 .* has 'multi_label_classification'",
        ),
        (lambda: [tiny_vit()], {"prediction": "vote"}, "prediction='vote': choose one of sum, mean_probability"),
        (lambda: [tiny_vit()], {"inputs": [0, 1]}, r"inputs=\[0, 1\] must have one value for each of 1 members"),
        (
            lambda: [tiny_vit(), tiny_resnet()],
            {"inputs": [0, 2]},
            r"inputs=\[0, 2\] must number the distinct processors",
        ),
        (lambda: [tiny_vit()], {"sources": ["a", "b"]}, r"sources=\['a', 'b'\] must have one value"),
    ],
)
def test_what_cannot_work_together_is_named(make, options, message):
    with pytest.raises(OptionError, match=message):
        CollaborativeModel.from_members(make(), **options)


def test_code_from_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr(hf.ViTForImageClassification, "_auto_class", "AutoModelForImageClassification")
    with pytest.raises(OptionError, match=r"member 1 \(ViT.* runs code from the Hub"):
        CollaborativeModel.from_members([tiny_resnet(), tiny_vit()])


def test_a_config_without_members_is_refused():
    with pytest.raises(OptionError, match="members: the config lists none"):
        CollaborativeModel(CollaborativeConfig())
    with pytest.raises(OptionError, match="task='sound': choose one of image, text"):
        CollaborativeConfig(task="sound")


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An ensemble with members whose tensors have other names on disk, and its folder."""
    folder = tmp_path_factory.mktemp("ensemble")
    model = CollaborativeModel.from_members(
        [tiny_resnet(), tiny_vit(), tiny_swin()], [0, 1, 0], "mean_probability", ["org/resnet", None, "swin"]
    )
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the saved ensemble's folder."""
    return Path(shutil.copytree(saved[1], tmp_path / "ensemble"))


@pytest.mark.parametrize("loader", [CollaborativeModel, hf.AutoModelForImageClassification])
def test_saved_and_loaded_bit_for_bit(saved, loader):
    model, folder = saved
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is CollaborativeModel and not loaded.training and not loaded.members[1].training
    same_tensors(snapshot(loaded), snapshot(model))
    assert torch.equal(loaded(**images()).logits, model(**images()).logits)
    for name in ("inputs", "prediction", "sources", "task", "members", "id2label"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert loaded.config.name_or_path == str(folder)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    parts = {f"member_{index}/{name}" for index in range(3) for name in ("config.json", "model.safetensors")}
    assert files == parts | {"config.json"}


def test_text_members_saved_and_loaded(tmp_path):
    model = CollaborativeModel.from_members([tiny_bert(), tiny_bert(seed=1)])
    model.save_pretrained(tmp_path, safe_serialization=True)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    same_tensors(snapshot(loaded), snapshot(model))
    assert zoo.task_of(loaded.config) == "text" and zoo.task_of(ensemble().config) == "image"


WITHOUT_US = """
import sys, torch
sys.modules["hf_ft"] = None  # an import would fail
from transformers import AutoModelForImageClassification
folder, inputs = sys.argv[1], torch.load(sys.argv[2])
for index in (0, 1, 2):
    plain = AutoModelForImageClassification.from_pretrained(f"{folder}/member_{index}")
    nested = AutoModelForImageClassification.from_pretrained(folder, subfolder=f"member_{index}")
    with torch.no_grad():
        one, other = plain(**inputs).logits, nested(**inputs).logits
    assert torch.equal(one, other)
    torch.save(one, f"{sys.argv[2]}.{index}")
"""
FRESH = """
import sys, torch, hf_ft
from transformers import AutoModelForImageClassification
model, inputs = AutoModelForImageClassification.from_pretrained(sys.argv[1]), torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(pixel_values_1=inputs["pixel_values"], **inputs).logits, f"{sys.argv[2]}.all")
"""


@pytest.mark.slow
def test_other_processes_load_members_and_ensemble(saved, tmp_path):
    model, folder = saved
    inputs = {"pixel_values": images()["pixel_values"]}
    torch.save(inputs, tmp_path / "inputs")
    for code in (WITHOUT_US, FRESH):
        done = python("-c", code, folder, tmp_path / "inputs")
        assert done.returncode == 0, done.stderr
    with torch.no_grad():
        outputs = model(pixel_values_1=inputs["pixel_values"], **inputs)
    for index, logits in enumerate(outputs.member_logits):
        torch.testing.assert_close(torch.load(tmp_path / f"inputs.{index}"), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.load(tmp_path / "inputs.all"), outputs.logits, rtol=1e-5, atol=1e-5)


def test_a_given_state_dict_is_what_is_saved(saved, tmp_path):
    model, _ = saved
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    before = snapshot(model)
    model.save_pretrained(tmp_path, state_dict=doubled)
    same_tensors(CollaborativeModel.from_pretrained(tmp_path).state_dict(), doubled)
    same_tensors(snapshot(model), before)


def test_other_processes_of_a_run_write_no_config(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("config.json"))


def test_shards(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "member_1" / "model.safetensors.index.json").exists()
    same_tensors(snapshot(CollaborativeModel.from_pretrained(tmp_path)), snapshot(model))


def test_dtypes_and_names_are_kept(tmp_path):
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_vit().to(torch.bfloat16)])
    model.config.id2label, model.config.label2id = NAMED["id2label"], NAMED["label2id"]
    model.save_pretrained(tmp_path)
    loaded = CollaborativeModel.from_pretrained(tmp_path)
    assert [member.dtype for member in loaded.members] == [torch.float32, torch.bfloat16]
    alone = hf.AutoModelForImageClassification.from_pretrained(tmp_path, subfolder="member_1")
    assert loaded.config.id2label == loaded.members[0].config.id2label == alone.config.id2label == NAMED["id2label"]
    for loader in (CollaborativeModel, hf.AutoModelForImageClassification):
        half = loader.from_pretrained(tmp_path, dtype="bfloat16")
        assert [member.dtype for member in half.members] == [torch.bfloat16] * 2


def test_a_new_model_from_a_config(saved):
    torch.manual_seed(7)
    new = hf.AutoModelForImageClassification.from_config(saved[0].config)
    assert type(new) is CollaborativeModel and new.training
    assert [type(member) for member in new.members] == [type(member) for member in saved[0].members]
    assert not torch.equal(new.members[0].classifier[1].weight, saved[0].members[0].classifier[1].weight)


def test_a_config_may_be_given_instead(saved):
    model, folder = saved
    config = copy.deepcopy(model.config)
    config.prediction, config.problem_type = "sum", "multi_label_classification"
    config.members[1]["hidden_dropout_prob"] = 0.3
    loaded = CollaborativeModel.from_pretrained(folder, config=config)
    assert loaded.config.prediction == "sum" and loaded.members[1].config.hidden_dropout_prob == 0.3
    assert loaded.members[2].config.problem_type == "multi_label_classification"
    loaded.config.members[0].clear()
    assert config.members[0]["model_type"] == "resnet"


def test_new_labels_give_new_heads(saved):
    model, folder = saved
    torch.manual_seed(3)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded, info = hf.AutoModelForImageClassification.from_pretrained(folder, **options)
    heads = {"members.0.classifier.1", "members.1.classifier", "members.2.classifier"}
    assert {name for name, *_ in info["mismatched_keys"]} == {f"{h}.{n}" for h in heads for n in ("weight", "bias")}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded(**images()).logits.shape == (4, 7)
    body = {name: tensor for name, tensor in snapshot(model).items() if "classifier" not in name}
    same_tensors({name: tensor for name, tensor in snapshot(loaded).items() if name in body}, body)
    _, info = CollaborativeModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def test_read_from_the_cache_of_the_hub(saved, tmp_path):
    """By revision, and offline: every member is looked up in the cache."""
    model, folder = saved
    repo, commit = tmp_path / "models--org--ensemble", "0123456789" * 4
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit / "best")
    where = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": "best"}
    for loader in (CollaborativeModel, hf.AutoModelForImageClassification):
        same_tensors(snapshot(loader.from_pretrained("org/ensemble", revision="v1", **where)), snapshot(model))
    with pytest.raises(OSError):
        CollaborativeModel.from_pretrained("org/ensemble", **where)  # there is no main branch


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: truncate(folder / "config.json"),
    "another config": lambda folder: shutil.copy(folder.parent / "member_0" / "config.json", folder),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half of the weights": lambda folder: truncate(folder / "model.safetensors"),
    "other weights": lambda folder: shutil.copy(folder.parent / "member_0" / "model.safetensors", folder),
    "no folder": shutil.rmtree,
    "no JSON object": lambda folder: (folder / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_member_is_named(damage, damaged):
    DAMAGES[damage](damaged / "member_1")
    with pytest.raises(CheckpointError) as caught:
        CollaborativeModel.from_pretrained(damaged)
    message = str(caught.value)
    assert f"{damaged}/member_1 is missing or damaged: " in message and "Restore its files" in message
    fix = f"AutoModelForImageClassification.from_pretrained('{damaged}', subfolder='member_0')"
    assert fix in message
    assert type(eval(f"hf.{fix}")).__name__ == "ResNetForImageClassification"


def test_weights_are_never_read_from_a_pickle(saved, damaged):
    weights = damaged / "member_1" / "model.safetensors"
    torch.save(saved[0].members[1].state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="member_1 is missing or damaged"):
        CollaborativeModel.from_pretrained(damaged)


def test_a_plain_model_is_no_ensemble(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="the config lists none"):
        CollaborativeModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="contains 0 members, but the config is for 3"):
        CollaborativeModel.from_pretrained(tmp_path, config=ensemble().config)


# --- the Hub ------------------------------------------------------------------------------------------------

FILES = {f"member_{index}/{name}" for index in range(3) for name in ("config.json", "model.safetensors")}


class Repo:
    def __init__(self, repo_id, **_):
        self.repo_id = repo_id


def test_push_to_hub_uploads_the_members(saved, monkeypatch):
    commits = []

    def commit(*_, repo_id, operations, **__):
        commits.append((repo_id, {operation.path_in_repo for operation in operations}))

    # Some versions of Transformers call functions, others methods.
    for name, stub in (("create_commit", commit), ("create_repo", lambda repo_id, **_: Repo(repo_id))):
        monkeypatch.setattr(hf.utils.hub, name, stub, raising=False)
        monkeypatch.setattr(HfApi, name, lambda self, *args, stub=stub, **options: stub(*args, **options))
    saved[0].push_to_hub("org/ensemble")
    assert commits == [("org/ensemble", FILES | {"config.json", "README.md"})]


def test_save_and_push(saved, monkeypatch, tmp_path):
    uploads = []

    def upload(self, *, repo_id, folder_path, allow_patterns, **options):
        paths = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        uploads.append((repo_id, set(filter_repo_objects(paths, allow_patterns=allow_patterns)), options))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: Repo(repo_id))
    (tmp_path / "checkpoint-4" / "member_0").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / "member_0" / "model.safetensors").touch()
    (tmp_path / "member_7").mkdir()  # of an earlier ensemble
    (tmp_path / "member_7" / "model.safetensors").touch()
    (tmp_path / "README.md").touch()
    for _ in range(2):  # the second time, no file is new
        saved[0].save_pretrained(tmp_path, push_to_hub=True, repo_id="org/ensemble", commit_message="first")
    assert uploads == [("org/ensemble", FILES | {"config.json", "README.md"}, {"commit_message": "first"})] * 2
    saved[0].save_pretrained(tmp_path, push_to_hub=True)
    assert uploads[-1][0] == tmp_path.name


# --- what else reads and writes it ----------------------------------------------------------------------------


def test_load_weights(saved, damaged):
    model, folder = saved
    other = CollaborativeModel.from_members([tiny_resnet(seed=5), tiny_vit(seed=5), tiny_swin(seed=5)], [0, 1, 0])
    load_weights(other, folder)
    same_tensors(snapshot(other), snapshot(model))
    with pytest.raises(CheckpointError, match="member_1 is missing or damaged"):
        load_weights(CollaborativeModel.from_members([tiny_resnet(), tiny_swin(), tiny_vit()]), folder)
    with pytest.raises(CheckpointError, match="contains 3 members, but the config is for 2"):
        load_weights(CollaborativeModel.from_members([tiny_resnet(), tiny_vit()]), folder)
    truncate(damaged / "member_2" / "model.safetensors")
    with pytest.raises(CheckpointError, match="member_2 is missing or damaged"):
        load_weights(other, damaged)


def test_delta(saved, tmp_path):
    model, folder = saved
    base = digests(model)
    trained = copy.deepcopy(model)
    nn.init.ones_(trained.members[1].classifier.weight)
    nn.init.ones_(trained.members[2].swin.layernorm.bias)
    save_delta(trained, tmp_path, base, resolve("full"), "org/ensemble")
    same_tensors(snapshot(load_delta(copy.deepcopy(model), tmp_path)), snapshot(trained))
    same_tensors(snapshot(load_delta(str(folder), tmp_path)), snapshot(trained))
    other = CollaborativeModel.from_members([tiny_resnet(seed=5), tiny_vit(), tiny_swin()])
    with pytest.raises(CheckpointError, match="is not the base"):
        load_delta(other, tmp_path)


def test_source_heads_are_not_kept(saved):
    with pytest.raises(OptionError, match="is an ensemble: it has a head for each member"):
        zoo.from_pretrained(str(saved[1]), 5)


def test_pinned_gates_stay_frozen(tmp_path):

    member = tiny_efficientnet()
    for name, parameter in member.named_parameters():
        if zoo.GATES in name:
            nn.init.constant_(parameter, 30.0 if name.endswith("expand.bias") else 0.0)
    CollaborativeModel.from_members([tiny_resnet(), member]).save_pretrained(tmp_path)
    loaded = zoo.models._load(str(tmp_path), {"num_labels": 5})
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in loaded.named_parameters() if zoo.GATES in name}
    assert loaded.config.num_labels == loaded.members[1].classifier.out_features == 5


def test_model_card(saved):
    card = str(model_card([], saved[0], model_name="org/mine", base_model="/a/path", metrics={}, arguments={}))
    assert "base_model: org/resnet\n" in card and "pipeline_tag: image-classification" in card
    assert "An ensemble of 3 members from [org/resnet](https://huggingface.co/org/resnet), `swin`," in card
    usage = card.partition("```python\n")[2].partition("```")[0]
    compile(usage, "usage", "exec")
    assert usage.startswith("import hf_ft") and 'from_pretrained("org/mine", subfolder="member_0")' in usage
    unknown = CollaborativeModel.from_members([tiny_bert()])
    card = str(model_card([], unknown, model_name="mine", base_model=None, metrics={}, arguments={}))
    assert "base_model" not in card and "An ensemble of 1 members, fine-tuned" in card
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card


# --- training -----------------------------------------------------------------------------------------------


def rows(count, seed):
    columns = {name: tensor.numpy() for name, tensor in images(count, seed).items()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def trainer(model, folder, **options):
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    arguments = tiny_arguments(folder, remove_unused_columns=False, **{**steps, **options})
    return FTTrainer(model, arguments, strategy="full", train_dataset=rows(32, 1), eval_dataset=rows(16, 2))


@pytest.mark.slow
def test_trained_resumed_and_the_best_one_loaded(tmp_path):
    whole = trainer(ensemble(), tmp_path / "whole", load_best_model_at_end=True, learning_rate=0.05)
    whole.train()
    best = Path(whole.state.best_model_checkpoint)
    same_tensors(snapshot(whole.model), snapshot(CollaborativeModel.from_pretrained(best)))
    assert whole.predict(rows(16, 2)).predictions.shape == (16, CLASSES)
    last = CollaborativeModel.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-8")
    again = trainer(ensemble(), tmp_path / "whole", learning_rate=0.05)
    again.train(resume_from_checkpoint=True)
    same_tensors(snapshot(again.model), snapshot(last))
    alone = hf.AutoModelForImageClassification.from_pretrained(best, subfolder="member_1")
    same_tensors(snapshot(alone), snapshot(CollaborativeModel.from_pretrained(best).members[1]))
    card = (best / "README.md").read_text()
    assert "import hf_ft" in card


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", [Path.unlink, truncate])
def test_a_checkpoint_with_a_damaged_member_is_incomplete(file, change, tmp_path):
    run = trainer(ensemble(), tmp_path, max_steps=1, save_steps=1, eval_strategy="no")
    run.train()
    assert is_complete(tmp_path / "checkpoint-1")
    change(tmp_path / "checkpoint-1" / "member_2" / file)
    assert not is_complete(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["model_type"] == "hf_ft_collaborative"


@pytest.mark.slow
def test_a_missing_shard_makes_a_checkpoint_incomplete(saved, tmp_path):
    run = trainer(ensemble(), tmp_path, max_steps=1, save_steps=1, eval_strategy="no")
    run.train()
    run.model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="10KB")
    for member in (tmp_path / "checkpoint-1").glob("member_*"):
        (member / "model.safetensors").unlink()
    seal(tmp_path / "checkpoint-1")
    assert is_complete(tmp_path / "checkpoint-1")
    next((tmp_path / "checkpoint-1" / "member_1").glob("model-00002*")).unlink()
    assert not is_complete(tmp_path / "checkpoint-1")


def test_a_pickle_is_never_read(saved, tmp_path):
    folder = tmp_path / "pickled"
    saved[0].save_pretrained(folder)
    member = folder / "member_1"
    torch.save(saved[0].members[1].state_dict(), member / "pytorch_model.bin")
    (member / "model.safetensors").unlink()
    for options in ({}, {"use_safetensors": None}, {"use_safetensors": False}):
        with pytest.raises(CheckpointError, match="member_1"):
            CollaborativeModel.from_pretrained(folder, **options)
