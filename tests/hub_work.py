"""What processes do with the Hub of tests/hub_server.py: `python -m tests.hub_work upload|load|fail FOLDER`.

Each prints JSON: what went wrong in each part, nothing if all is well.
"""

import json
import logging
import os
import platform
import socket
import sys
import traceback
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

import hf_ft
from hf_ft.cli import main
from hf_ft.data.info import DataInfo
from hf_ft.inference import load_trained
from hf_ft.testing import tiny_data, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.models import load_model
from tests import quick
from tests.hub_api import TOKEN

NAMES = {0: "cat", 1: "dog", 2: "eel"}
SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
PARTS = {}


def part(function):
    PARTS[function.__name__] = function
    return function


def expected(folder):
    return load_file(folder / "expected.safetensors")


def logits(model):
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        inputs = {name: value for name, value in tiny_inputs(plain).items() if name != "labels"}
        return model.eval()(**inputs).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def push_base(name, make, **more):
    """Push a pretrained model with other classes, as anyone might."""
    make(num_labels=7, **more).push_to_hub(name)
    processor().push_to_hub(name)


def trainer_of(model, folder, strategy="full", **arguments):
    args = tiny_arguments(folder, **{"max_steps": 4, "hub_token": TOKEN, **arguments})
    data = tiny_data(model)
    more = {"train_dataset": data, "eval_dataset": data, "processing_class": processor()}
    return hf_ft.FTTrainer(model, args, strategy=strategy, **more)


def trained(name, folder, strategy="full", **arguments):
    found = trainer_of(load_model(name, id2label=NAMES)[0], folder, strategy, **arguments)
    found.train()
    return found


# --- uploads ----------------------------------------------------------------------------------------------------


def upload(folder):
    """Upload one of each kind, and record what each computes."""
    runs, kept = Path.home() / "runs", {}
    push_base("org/resnet", tiny_resnet)
    push_base("org/vit", tiny_vit)
    _plain(runs / "cells", kept)
    _deltas(runs / "changed", kept)
    _adapters(runs, kept)
    _ensemble(runs / "both", kept)
    hf_ft.LPFTConfig(probe=0.25).push_to_hub("ann/strategy")
    hf_ft.L2SPConfig(alpha=0.5).push_to_hub("ann/strategy", revision="other")
    _photos(folder / "photos")
    arguments = f"--model org/resnet --dataset {folder / 'photos'} --max_steps 2 --use_cpu true --strategy lp_ft"
    arguments += f" --output_dir {runs / 'photos'} --push_to_hub true --hub_model_id ann/photos"
    assert main(["train", *arguments.split()]) == 0
    save_file(kept, folder / "expected.safetensors")
    push_base("org/resnet", tiny_resnet, seed=5)  # the base gets a new commit
    return {}


def _plain(folder, kept):
    arguments = {"push_to_hub": True, "hub_model_id": "cells", "hub_strategy": "every_save", **SAVING}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trained("org/resnet", folder, hf_ft.L2SPConfig(), **arguments)
    trainer.data_info = DataInfo.of("ethz/food101", {"train": 32})
    (folder / "runs" / "Jan01_plantedhost").mkdir(parents=True)
    (folder / "runs" / "Jan01_plantedhost" / "events.out.tfevents.1.plantedhost").write_text(str(folder))
    (folder / "notes.log").write_text(str(folder))
    trainer.push_to_hub(license="Apache-2.0")
    kept["plain"] = logits(trainer.model)


def _deltas(folder, kept):
    for strategy, revision in (("full", "first"), ("linear_probe", None)):
        trainer = trained("org/resnet", folder / strategy, strategy)
        trainer.push_delta("ann/delta", revision=revision)
        kept[f"delta {revision}"] = logits(trainer.model)


def _adapters(runs, kept):
    tuner = LoraConfig(r=2, init_lora_weights=False)
    strategy = hf_ft.PEFTConfig(tuner=tuner, merge=False)
    arguments = {"push_to_hub": True, "hub_model_id": "ann/adapter", "hub_strategy": "checkpoint", **SAVING}
    trainer = trained("org/vit", runs / "adapter", strategy, **arguments)
    trainer.push_to_hub()
    kept["adapter"] = logits(trainer.model)
    for own in (tiny_vit(), processor()):
        own.save_pretrained(runs / "vit")
    local = trained(str(runs / "vit"), runs / "local", strategy, hub_model_id="ann/local")
    local.push_to_hub()


def _ensemble(folder, kept):
    model = hf_ft.load_sources(["org/resnet", "org/vit"], id2label=NAMES)
    model = model[0] if isinstance(model, tuple) else model
    trainer = trainer_of(model, folder, hub_model_id="ann/both")
    trainer.train()
    trainer.push_to_hub()
    kept["ensemble"] = logits(trainer.model)
    kept |= {f"member {index}": logits(member) for index, member in enumerate(trainer.model.members)}
    trainer.model.save_pretrained(folder / "again", push_to_hub=True, repo_id="ann/again")


def _photos(folder):
    for index, name in NAMES.items():
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (80 * index + i, 0, 80)).save(folder / name / f"{i}.png")


# --- downloads --------------------------------------------------------------------------------------------------


@part
def plain_checkpoint(folder):
    same(logits(AutoModelForImageClassification.from_pretrained("ann/cells")), expected(folder)["plain"])


@part
def classified_by_pipeline(folder):
    photo = Image.open(folder / "photos" / "eel" / "0.png")
    found = pipeline("image-classification", model="ann/cells", device="cpu")(photo)
    model = AutoModelForImageClassification.from_pretrained("ann/cells").eval()
    with torch.no_grad():
        own = model(**processor()(photo, return_tensors="pt")).logits.softmax(-1)[0]
    assert {one["label"]: round(one["score"], 4) for one in found} == {
        NAMES[index]: round(float(value), 4) for index, value in enumerate(own)
    }


@part
def what_the_client_asks(folder):
    api = HfApi()
    sizes = {file.path: file.size for file in api.list_repo_tree("ann/cells", recursive=True)}
    weights = api.get_paths_info("ann/cells", ["model.safetensors"])[0]
    assert api.whoami()["name"] == "ann" and sizes["model.safetensors"] == weights.size == weights.lfs.size
    assert {branch.name for branch in api.list_repo_refs("ann/strategy").branches} == {"main", "other"}
    assert {file.rfilename for file in api.model_info("ann/cells").siblings} == set(sizes)


@part
def model_of_a_save(folder):
    first = next(one for one in HfApi().list_repo_commits("ann/cells") if one.title.endswith("step 2"))
    model = AutoModelForImageClassification.from_pretrained("ann/cells", revision=first.commit_id)
    assert not torch.equal(logits(model), expected(folder)["plain"])
    assert model.config.id2label == NAMES


@part
def delta_with_its_base(folder):
    same(logits(hf_ft.load_delta("ann/delta")), expected(folder)["delta None"])


@part
def delta_of_a_revision(folder):
    same(logits(hf_ft.load_delta("ann/delta", revision="first")), expected(folder)["delta first"])


@part
def delta_on_another_base_is_refused(folder):
    moved = load_model("org/resnet", id2label=NAMES)[0]
    try:
        hf_ft.load_delta(moved, "ann/delta")
    except hf_ft.CheckpointError as error:
        assert "is not the base of ann/delta" in str(error)
    else:
        raise AssertionError("it was not")


@part
def delta_that_is_not_there(folder):
    try:
        hf_ft.load_delta("ann/nothing")
    except hf_ft.CheckpointError as error:
        assert "ann/nothing is not a local folder" in str(error)
    else:
        raise AssertionError("it was")


@part
def delta_is_no_model_to_train(folder):
    try:
        load_model("ann/delta", id2label=NAMES)
    except hf_ft.CheckpointError as error:
        assert "ann/delta is a delta, without the weights of its base" in str(error)
    else:
        raise AssertionError("it was loaded")


@part
def adapter_by_peft(folder):
    base = AutoModelForImageClassification.from_pretrained("org/vit", num_labels=3, ignore_mismatched_sizes=True)
    same(logits(PeftModel.from_pretrained(base, "ann/adapter")), expected(folder)["adapter"])


@part
def adapter_with_its_base(folder):
    same(logits(load_trained("ann/adapter").model), expected(folder)["adapter"])


@part
def ensemble(folder):
    for name in ("ann/both", "ann/again"):
        same(logits(AutoModelForImageClassification.from_pretrained(name)), expected(folder)["ensemble"])


@part
def members_alone(folder):
    for index in range(2):
        member = AutoModelForImageClassification.from_pretrained("ann/both", subfolder=f"member_{index}")
        same(logits(member), expected(folder)[f"member {index}"])


@part
def config_alone(folder):
    assert hf_ft.LPFTConfig.from_pretrained("ann/strategy") == hf_ft.LPFTConfig(probe=0.25)
    assert hf_ft.FTConfig.from_pretrained("ann/strategy", revision="other") == hf_ft.L2SPConfig(alpha=0.5)


@part
def predicted_by_command(folder):
    for name, more in (("delta", []), ("delta", ["--revision", "first"]), ("adapter", []), ("photos", [])):
        file = folder / f"{name}{len(more)}.csv"
        arguments = ["--model", f"ann/{name}", "--dataset", str(folder / "photos"), "--output", str(file), *more]
        assert main(["predict", *arguments]) == 0
        assert len(file.read_text().splitlines()) == 13


# --- uploads that fail ------------------------------------------------------------------------------------------


class Told(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def fail(folder):
    """The server refuses requests for some repositories, as often as there are uploads before the last one."""
    told = Told()
    logging.getLogger("hf_ft").addHandler(told)
    found, runs = {}, Path.home() / "failed"
    for name in ("refused", "broken", "dropped"):
        arguments = {"push_to_hub": True, "hub_model_id": f"ann/{name}", "hub_strategy": "every_save", **SAVING}
        trainer = trained("org/resnet", runs / name, hub_always_push=True, **arguments)
        try:
            trainer.push_to_hub()
        except hf_ft.HubError as error:
            found[name] = str(error)
        same(logits(AutoModelForImageClassification.from_pretrained(runs / name)), logits(trainer.model))
        assert main(["push", "--model", str(runs / name), "--hub_model_id", f"ann/{name}"]) == 0
        same(logits(AutoModelForImageClassification.from_pretrained(f"ann/{name}")), logits(trainer.model))
    found["told"] = told.lines
    try:
        trainer.push_delta("ann/refused-delta")
    except hf_ft.HubError as error:
        found["delta"] = str(error)
    assert (runs / "dropped" / "ft_delta" / "ft_delta.safetensors").is_file()
    try:
        trainer_of(tiny_resnet(), runs / "none", push_to_hub=True, hub_model_id="ann/forbidden")
    except hf_ft.HubError as error:
        found["before"] = str(error)
    return found


def load(folder):
    found = {}
    for name, function in PARTS.items():
        try:
            function(folder)
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    quick.set_up()
    socket.gethostname = platform.node = lambda: "plantedhost"  # of which nothing may be uploaded
    os.chdir(sys.argv[2])
    result = {"upload": upload, "load": load, "fail": fail}[sys.argv[1]](Path(sys.argv[2]))
    Path(sys.argv[2], f"{sys.argv[1]}.json").write_text(json.dumps(result))
