"""Audio and video classifiers are loaded like image and text classifiers, with or without the old head."""

import pytest
import torch
from transformers import PerceiverConfig

from hf_ft.errors import OptionError
from hf_ft.models.source_head import has_source_head
from hf_ft.models.tasks import tasks_of
from hf_ft.testing.families import families, samples, tiny
from hf_ft.zoo import from_pretrained, task_of

LOADED = ("ASTForAudioClassification", "TimesformerForVideoClassification", "VideoMAEForVideoClassification")


@pytest.mark.parametrize("name", LOADED)
def test_an_audio_or_video_checkpoint_gets_a_new_head_beside_the_old_one(name, tmp_path):
    pretrained = tiny(name, num_labels=5, num_hidden_layers=8)
    pretrained.save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path), num_labels=3)
    assert type(model).__name__ == name and has_source_head(model)
    batch = samples(model)
    assert model(**batch).logits.shape == (4, 3)
    for key, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, pretrained.base_model.state_dict()[key]), key


def test_a_config_for_several_tasks_is_resolved_by_the_class_it_names():
    with pytest.raises(OptionError, match="image and text"):
        task_of(PerceiverConfig())
    assert task_of(PerceiverConfig(architectures=["PerceiverForImageClassificationLearned"])) == "image"


def test_every_family_is_of_one_task():
    told = {name: tasks_of(type(tiny(name).config)(architectures=[name])) for name in LOADED}
    assert told == {name: [families()[name]] for name in LOADED}
