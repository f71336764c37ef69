"""Layers that a model randomly skips in training (LayerDrop) are left out of the terms in that step."""

import dataclasses

import pytest
import torch

from hf_ft import AttentionTransferConfig, DELTAConfig, FTTrainer, OptionError, Plan, Stream, Term, TREDConfig, set_up
from hf_ft.core.view import LayerStates
from hf_ft.engine.objective import Objective
from hf_ft.models.anatomy import anatomy
from hf_ft.models.preserve import random_states_kept
from hf_ft.testing.training import tiny_arguments, tiny_data
from tests.functional_dropout import inputs, tiny

UNIFORM = DELTAConfig(weights="uniform", beta=0.0)
RATES = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def dropping(kind, rate):
    """A model that skips each layer with this probability."""
    fields = tiny(kind).config.to_dict()
    return tiny(kind, **{name: rate for name in RATES if name in fields})


@pytest.mark.parametrize("kind", ["wav2vec2", "bart", "opt", "whisper"])
@pytest.mark.parametrize("strategy", [UNIFORM, AttentionTransferConfig()], ids=["delta", "attention_transfer"])
def test_a_skipped_layer_is_left_out_for_the_step(kind, strategy):
    model = dropping(kind, 0.3)
    run = set_up(model, strategy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # away from the reference
    (term,) = run.plan.terms
    each = [
        dataclasses.replace(term, name=layer, layers=(layer,), fn=dataclasses.replace(term.fn, layers=(layer,)))
        for layer in term.layers
    ]
    objective = Objective(model, Plan(terms=(term, *each)), run.chains, reference=run.reference).train()
    skipped = set()
    for seed in range(12):
        with random_states_kept(seed):
            terms = objective(**inputs(model))["terms"]
        alone = [terms[layer] for layer in term.layers]
        torch.testing.assert_close(terms[term.name], torch.stack(alone).sum())
        skipped.add(sum(float(value) == 0 for value in alone))
    assert 0 in skipped and len(skipped) > 1, "nothing is tested"


def test_training_ends_although_the_only_layer_is_skipped(tmp_path):
    model = dropping("opt", 0.5)
    data = tiny_data(model, 16)
    FTTrainer(model, tiny_arguments(tmp_path), strategy=TREDConfig(epochs=1), train_dataset=data).train()


class OfStream:
    def __call__(self, view):
        return sum(state.square().mean() for state in view.streams["source"].states.values())


def with_stream(model, layer, forward):
    stream, term = Stream("source", forward=forward), Term("t", OfStream(), layers=(layer,), stream="source")
    return Objective(model, Plan(terms=(term,), streams=(stream,)), anatomy(model).chains).train()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_layers_of_a_stream(forward):
    model = dropping("bart", 0.5)
    batch, source = inputs(model), inputs(model, seed=1)
    objective = with_stream(model, "model.encoder.layers.1", forward)
    with random_states_kept(0):
        values = [float(objective(**batch, stream_source=source)["terms"]["t"]) for _ in range(10)]
    assert 0.0 in values and max(values) > 0
    with pytest.raises(OptionError, match="layers' produced no output.*lists of modules"):
        with_stream(model, "model.encoder.layers", forward)(**batch, stream_source=source)


def test_a_term_that_reads_a_skipped_layer_gets_an_error_with_the_fix():
    with pytest.raises(OptionError, match="'b' did not run.*LayerDrop.*called.*layerdrop to 0"):
        LayerStates(a=torch.zeros(1))["b"]


@pytest.mark.parametrize("kind", ["wav2vec2", "bart", "opt"])
def test_distributed_training_is_told_that_parameters_may_lack_a_gradient(kind):
    assert set_up(dropping(kind, 0.1), "full").objective().sometimes_unused
    assert not set_up(dropping(kind, 0.0), "full").objective().sometimes_unused
