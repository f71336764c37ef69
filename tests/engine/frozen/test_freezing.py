"""Which modules rest in a stage, and where a model comes alive."""

import pytest
from torch import nn

from hf_ft import anatomy
from hf_ft.core.plan import Stage
from hf_ft.engine.frozen.freezing import liveness, moving_norms
from hf_ft.models.parts import Chain
from hf_ft.testing import TINY_MODELS, tiny_bert, tiny_collaborative, tiny_resnet, tiny_vit


def found(model, *trains, norm_mode="auto"):
    """The liveness if these modules or parameters train, and the names of those that rest."""
    trained = {n for n, _ in model.named_parameters() if any(n == t or n.startswith(f"{t}.") for t in trains)}
    assert trained
    moving = moving_norms(model, Stage("stage", norm_mode=norm_mode), trained)
    result = liveness(model, anatomy(model).chains, trained, moving)
    names = {module: name for name, module in model.named_modules()}
    return result, {names[module] for module in result.resting}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_where_all_trains_nothing_rests(name):
    model = TINY_MODELS[name]()
    result, resting = found(model, *(child for child, _ in model.named_children()))
    assert not resting and not result.has_prefix and result.live_from[0] == 0


def test_parts_before_the_first_that_trains_rest():
    model = tiny_bert()
    result, resting = found(model, "bert.encoder.layer.1", "classifier")
    assert result.trained_from == result.live_from == (2,) and result.has_prefix
    assert "bert.encoder.layer.0.attention.self.dropout" in resting and "bert.embeddings.dropout" in resting
    assert not any(name.startswith("bert.encoder.layer.1") for name in resting)


def test_inside_of_a_block_what_is_frozen_before_rests():
    model = tiny_bert()
    block = "bert.encoder.layer.1"
    result, resting = found(model, f"{block}.intermediate", f"{block}.output", "bert.encoder.layer.2", "classifier")
    assert f"{block}.attention.self.dropout" in resting, "else it would drop values that are recorded without"
    assert f"{block}.output.dropout" not in resting
    assert result.chains[0].parts[0].modules[0].startswith(f"{block}.intermediate"), "recorded up to here"


def test_a_block_that_trains_whole_keeps_its_dropout():
    """DistilBERT defines it before all layers of the attention."""
    model = TINY_MODELS["distilbert"]()
    _, resting = found(model, "distilbert.transformer.layer.1", "classifier")
    assert not any(name.startswith("distilbert.transformer.layer.1") for name in resting)


def test_a_parameter_of_the_block_itself_may_be_used_anywhere_in_it():
    model = TINY_MODELS["convnext"]()
    block = "convnext.encoder.stages.1.layers.1"
    result, resting = found(model, f"{block}.layer_scale_parameter", f"{block}.pwconv2", "classifier")
    assert result.chains[0].parts[0].modules == (block,)
    assert f"{block}.dwconv" not in resting
    token, _ = found(tiny_vit(), "vit.embeddings.cls_token", "classifier")
    assert token.chains[0].parts[0].modules == ("vit.embeddings",)


def test_statistics_that_move_are_alive_though_nothing_trains():
    model = tiny_resnet()
    result, resting = found(model, "resnet.encoder.stages.1", "classifier", norm_mode="train")
    assert result.live_from == (0,) and result.trained_from == (2,) and not result.has_prefix
    assert "resnet.embedder" in resting, "the trainer wakes its norms, and nothing else of it"
    assert not moving_norms(model, Stage("stage", norm_mode="eval"), {"classifier.weight"})


def test_every_member_comes_alive_by_itself():
    model = tiny_collaborative()
    result, resting = found(model, "members.0", "members.1.classifier")
    first, second = result.chains
    assert (first.name, second.name) == ("members.0", "members.1")
    assert result.trained_from[0] == 0 and result.trained_from[1] > 5 and result.has_prefix
    assert resting and all(name.startswith("members.1") for name in resting)
    assert len(second.parts) == 1


def test_a_member_of_which_nothing_trains():
    model = tiny_collaborative()
    result, resting = found(model, "members.0")
    assert result.chains[1] == Chain("members.1", ()) and result.has_prefix
    assert "members.1.classifier" in resting


def test_bare_modules_have_one_chain():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not liveness(model, (), {"0.weight"}, ()).has_prefix
