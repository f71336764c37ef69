"""The model card of a run."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import VivitConfig, VivitForVideoClassification

from hf_ft import FTConfig, Plan
from hf_ft.core.findings import Findings, Table, Text
from hf_ft.data.info import DataInfo
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import make_trainer
from hf_ft.trainer.model_card import card_of, model_card


@dataclass(frozen=True, kw_only=True)
class Searching(FTConfig):
    """Searches."""

    ft_type = "searching"

    def plan(self, model, state):
        return Plan()


TABLE = Table("scores of a|b", ("what", "score"), (("x", "0.5"),))
FOUND = Findings(
    "Chose x.",
    short=(TABLE, Table("", (), (("best", "x"),)), Text("only printed")),
    plots={"near.png": Path.touch, "far.png": Path.touch},
)


EMPTY = {"metrics": {}, "arguments": {}}


def card(**more):
    about = {"model_name": "mine", "base_model": None, **EMPTY}
    return str(model_card([Searching()], tiny_resnet(), **about | more))


def test_findings_of_any_strategy_are_shown():
    text = card(findings={"searching": FOUND}, beside=["near.png", "model.safetensors"])
    assert "Chose x.\n\n**scores of a\\|b**\n\n| what | score |\n| --- | --- |\n| x | 0.5 |" in text
    assert "![near](near.png)" in text and "far.png" not in text
    assert "only printed" not in text and "best" not in text


def test_without_findings_there_is_nothing_to_show():
    assert "**searching**: Searches.\n\n## Training" in card() == card(findings={"searching": Findings()})


def test_a_bar_in_an_option_does_not_end_its_cell():
    text = str(
        model_card([Searching(blocks="nodes|edges")], tiny_resnet(), model_name="mine", base_model=None, **EMPTY)
    )
    assert "| blocks | `nodes\\|edges` |" in text


def test_a_model_with_its_processor_is_used_in_a_pipeline():
    pipe = 'classify = pipeline("image-classification", model="mine")\nprint(classify("photo.png"))'
    alone = 'model = ResNetForImageClassification.from_pretrained("mine")\n```'
    assert pipe in card(processor=True) and alone in card(processor=True)
    assert "pipeline(" not in card() and alone in card()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    video = VivitForVideoClassification(VivitConfig(image_size=32, num_frames=2, **sizes))
    text = str(model_card([Searching()], video, model_name="mine", base_model=None, processor=True, **EMPTY))
    assert metadata(text)["pipeline_tag"] == "video-classification" and "pipeline(" not in text


def metadata(text):
    return ModelCard(text).data.to_dict()


def test_the_data_are_those_that_were_passed():
    info = DataInfo.of("elpv", {"train": 500, "validation": 250}, ("CC-BY-NC-SA-4.0.",))
    text = card(data=info, metrics={"eval_loss": 0.5, "eval_macro_f1": 0.75, "eval_top5": 0.9})
    assert "Data: `elpv` (500 train, 250 validation). CC-BY-NC-SA-4.0." in text and "datasets" not in metadata(text)
    result = metadata(text)["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "elpv", "type": "elpv", "split": "validation"}
    assert result["task"]["type"] == "image-classification"
    assert [(m["type"], m["name"], m["value"]) for m in result["metrics"]] == [
        ("loss", "Loss", 0.5),
        ("f1", "F1 (macro)", 0.75),
        ("top5", "top5", 0.9),
    ]


def test_a_folder_is_named_without_its_path(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    for source in (str(tmp_path / "photos"), f"{tmp_path}/photos/", "../photos", "."):
        info = DataInfo.of(source, {"train": 3})
        assert (info.name, info.hub_id) == ("photos", None)
        text = card(data=info)
        assert "Data: `photos` (3 train)." in text and str(tmp_path) not in text
    gone = DataInfo.of("/no/longer/there/cells", {})
    assert (gone.name, gone.hub_id, str(gone)) == ("cells", None, "Data: `cells`.")


def test_a_dataset_on_the_hub_is_linked():
    text = card(data=DataInfo.of("ethz/food101", {}), metrics={"eval_accuracy": 0.5})
    assert "Data: [ethz/food101](https://huggingface.co/datasets/ethz/food101)." in text
    assert metadata(text)["datasets"] == "ethz/food101"
    assert metadata(text)["model-index"][0]["results"][0]["dataset"]["type"] == "ethz/food101"


@pytest.mark.parametrize(
    ("base", "commit", "linked"),
    [
        ("mobilenet_v2-torchvision-imagenet1k-v1", None, False),
        ("microsoft/resnet-18", None, True),
        ("bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", True),
        ("bert-base-uncased", None, False),
    ],
)
def test_only_what_is_known_to_be_on_the_hub_is_linked(base, commit, linked):
    model = tiny_resnet()
    model.config._commit_hash = commit
    about = {"model_name": "mine", "metrics": {}, "arguments": {}}
    text = str(model_card([Searching()], model, base_model=base, **about))
    assert (f"[{base}](https://huggingface.co/{base}) fine-tuned" in text) == linked
    assert (f"`{base}` fine-tuned with hf_ft" in text) != linked
    assert metadata(text).get("base_model") == (base if linked else None)


@pytest.mark.parametrize(("rate", "shown"), [(5e-5, False), (1e-3, True)])
def test_a_fitted_rate_is_not_given_as_the_unused_default(rate, shown, tmp_path):
    trainer = make_trainer(tiny_resnet(), "linear_probe", tmp_path, learning_rate=rate)
    trainer.train()
    text = str(card_of(trainer, None, tmp_path))
    assert ("| learning_rate |" in text) is shown and "| optim |" in text
