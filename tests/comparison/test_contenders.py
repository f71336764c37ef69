"""Who takes part: the form of a strategy that fits model and data."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from hf_ft import DAFTConfig, SoftConfig
from hf_ft.comparison.contenders import entrant
from hf_ft.comparison.settings import Settings
from hf_ft.testing import tiny_resnet, tiny_vit


def entered(config, model):
    told = {"optims": ["sgd"], "metric": "accuracy", "epochs": 1.0, "model": model}
    return entrant(config.ft_type, [config], SimpleNamespace(source=None), Settings(), **told)


@pytest.mark.parametrize("convert", [True, False])
def test_without_batch_norm_daft_converts_none(convert):
    made = entered(DAFTConfig(convert_batch_norm=convert), tiny_vit())
    assert not made.configs[0].convert_batch_norm and not made.refusal
    assert made.notes == (("daft runs with convert_batch_norm=False to fit this model",) if convert else ())


def test_what_fits_runs_as_it_was_asked_for():
    made = entered(DAFTConfig(), tiny_resnet())
    assert made.configs[0].convert_batch_norm and not made.notes
    assert "source-free form" in entered(SoftConfig(), tiny_resnet()).notes[0]


@dataclass(frozen=True, kw_only=True)
class UnfitConfig(DAFTConfig):
    """It fits no model."""

    ft_type = "unfit"

    def adapted(self, model):
        return None


def test_what_has_no_form_for_the_model_is_refused():
    assert entered(UnfitConfig(), tiny_vit()).refusal == "unfit cannot run on this model: leave it out."
