"""L = CE + alpha/2 ||w_S - w0_S||^2 + beta/2 ||w_new||^2, against a float64 sum written out."""

import pytest
import torch

from hf_ft import L2SPConfig, set_up
from hf_ft.testing import tiny_inputs, tiny_vit


def test_terms_are_the_formula():
    model = tiny_vit()
    start = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    objective = set_up(model, L2SPConfig(alpha=0.3, beta=0.7)).objective()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    outputs = objective.train()(**tiny_inputs(model))
    body = head = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith("classifier"):
            head += float(parameter.detach().double().square().sum())
        else:
            body += float((parameter.detach().double() - start[name]).square().sum())
    terms = {name: value.item() for name, value in outputs["terms"].items()}
    assert terms["l2_sp"] == pytest.approx(0.3 / 2 * body, rel=1e-6)
    assert terms["l2_head"] == pytest.approx(0.7 / 2 * head, rel=1e-6)
    assert outputs["loss"].item() == pytest.approx(sum(terms.values()), rel=1e-6)
