"""The last layer through which all information passes, in networks whose last module is not such a layer."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_map

from hf_ft.models import last_feature_map
from hf_ft.models.find_head import find_head
from hf_ft.models.parts import Anatomy, Part
from tests.models.small_models import small, small_inputs

LAYERS = {
    "Siglip": "vision_model.post_layernorm",  # the pooling after it is not used
    "Siglip2": "vision_model.post_layernorm",
    "Lilt": "lilt.encoder.layer.1.output",  # its boxes have a separate path, which ends beside the logits
    "Canine": "canine.encoder.layer.1.output",  # the pooler reads the middle one of three encoders
    "DonutSwin": "donut.encoder.layers.1.blocks.1",  # not the branch beside the shortcut
    "IBert": "ibert.encoder.layer.1.output.LayerNorm",
    "T5": "transformer.decoder.final_layer_norm",  # the dropout after it is called twice
    "Hiera": "hiera.encoder.stages.2.layers.0",
    # Not covered by any rule.
    "Albert": "albert.encoder",  # its layers are called several times, and it returns a tuple
    "XLM": "transformer",  # sets padding to zero in place after its last norm
    "PvtV2": "pvt_v2.encoder",
}


def found_in(model, batch):
    head = Part("head", tuple(find_head(model)))
    return last_feature_map(model, Anatomy(head, Part("rest", ()), lambda: pytest.fail("the head is enough")), batch)


@pytest.mark.parametrize("name", LAYERS)
def test_all_information_in_the_logits_passes_through_the_layer(name):
    model = small(name)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    layer = found_in(model.train(), small_inputs(model))
    assert layer == LAYERS[name] and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)

    def constant(module, args, output):
        return tree_map(lambda leaf: torch.full_like(leaf, 0.5) if isinstance(leaf, torch.Tensor) else leaf, output)

    one, other = small_inputs(model, seed=1), small_inputs(model, seed=2)
    with torch.no_grad():
        model.eval()
        assert not torch.allclose(model(**one).logits, model(**other).logits, atol=1e-4)
        model.get_submodule(layer).register_forward_hook(constant)
        assert torch.allclose(model(**one).logits, model(**other).logits, atol=1e-6)


def test_a_new_head_of_zeros_hides_nothing():
    model = small("Siglip")
    torch.nn.init.zeros_(model.classifier.weight)
    assert found_in(model, small_inputs(model)) == LAYERS["Siglip"]
