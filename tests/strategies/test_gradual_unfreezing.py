"""Group g from the top trains from stage g on, at lr / decay^g."""

from hf_ft import GradualUnfreezingConfig, State, set_up
from hf_ft.testing import tiny_vit


def test_rates_of_each_stage():
    model = tiny_vit()  # stem, three blocks, neck, head
    config = GradualUnfreezingConfig(stages=3, decay=2.0)
    assert config.plan(model, State()).stages[0].trains == ("classifier",)
    groups = set_up(model, config).param_groups(lr=0.8)
    rates = {id(p): group["stage_rates"] for group in groups for p in group["params"]}
    head, top = model.classifier.weight, model.vit.layernorm.weight
    bottom = next(model.vit.embeddings.parameters())
    assert rates[id(head)] == (0.8, 0.8, 0.8)
    assert rates[id(top)] == (0.0, 0.4, 0.4)
    assert rates[id(bottom)] == (0.0, 0.0, 0.2)
    assert len(rates) == sum(1 for _ in model.parameters())
