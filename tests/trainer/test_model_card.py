"""The model card of a run."""

from dataclasses import dataclass
from pathlib import Path

from hf_ft import FTConfig, Plan
from hf_ft.core.findings import Findings, Table, Text
from hf_ft.testing import tiny_resnet
from hf_ft.trainer.model_card import model_card


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


def card(**more):
    about = {"model_name": "mine", "base_model": None, "metrics": {}, "arguments": {}}
    return str(model_card([Searching()], tiny_resnet(), **about, **more))


def test_findings_of_any_strategy_are_shown():
    text = card(findings={"searching": FOUND}, beside=["near.png", "model.safetensors"])
    assert "Chose x.\n\n**scores of a\\|b**\n\n| what | score |\n| --- | --- |\n| x | 0.5 |" in text
    assert "![near](near.png)" in text and "far.png" not in text
    assert "only printed" not in text and "best" not in text


def test_without_findings_there_is_nothing_to_show():
    assert "**searching**: Searches.\n\n## Training" in card() == card(findings={"searching": Findings()})
