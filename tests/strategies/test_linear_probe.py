"""The probe is softmax regression on the pretrained features: against one written in NumPy."""

import copy

import numpy as np
import pytest
import torch

from hf_ft.testing import TINY_MODELS, same_tensors, tiny_data
from hf_ft.testing.training import make_trainer, snapshot

STEPS, RATE = 6, 0.5
# All 32 samples in each batch, so that their order does not matter.
WHOLE = {"per_device_train_batch_size": 32, "max_steps": STEPS, "optim": "sgd", "lr_scheduler_type": "constant"}
WHOLE |= {"learning_rate": RATE, "max_grad_norm": 0.0, "weight_decay": 0.0}


def softmax_regression(features, labels, weight, bias):
    for _ in range(STEPS):
        scores = features @ weight.T + bias
        probabilities = np.exp(scores - scores.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        gap = (probabilities - np.eye(len(bias))[labels]) / len(labels)
        weight, bias = weight - RATE * gap.T @ features, bias - RATE * gap.sum(0)
    return weight, bias


@pytest.mark.parametrize("use", ["never", "always"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_head_is_that_of_a_regression_on_the_features(name, use, tmp_path):
    model = TINY_MODELS[name]()
    before, data = snapshot(model), tiny_data(model)[:]
    head = model.classifier[1] if name == "resnet" else model.classifier
    seen = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        copy.deepcopy(model).eval()(data["pixel_values"])
    hook.remove()
    features = seen[0].double().numpy()
    start = head.weight.detach().double().numpy().copy(), head.bias.detach().double().numpy().copy()
    weight, bias = softmax_regression(features, data["labels"].numpy(), *start)
    make_trainer(model, "linear_probe", tmp_path, use, **WHOLE).train()
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, atol=2e-5)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, atol=2e-5)
    assert np.abs(weight - start[0]).max() > 0.01
    body = {key: value for key, value in before.items() if not key.startswith("classifier")}
    same_tensors({key: snapshot(model)[key] for key in body}, body)
