"""The biases and the head take the steps of full fine-tuning, and nothing else changes."""

import pytest
import torch

from hf_ft import BitFitConfig, OptionError, State
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_data
from hf_ft.testing.training import make_trainer, snapshot

ONE_STEP = {"per_device_train_batch_size": 32, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
ONE_STEP |= {"learning_rate": 0.25, "max_grad_norm": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_one_step_of_gradient_descent_on_biases_and_head(name, tmp_path):
    model = TINY_MODELS[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before, data = snapshot(model), tiny_data(model)
    plain = {key: value.double() if value.is_floating_point() else value for key, value in before.items()}
    reference = TINY_MODELS[name]().double().eval()
    reference.load_state_dict(plain)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in data[:].items()}
    reference(**batch).loss.backward()
    trainer = make_trainer(model, BitFitConfig(head_lr=None, norm_mode="eval"), tmp_path, **ONE_STEP)
    trainer.train()
    moved = 0
    for key, parameter in reference.named_parameters():
        trains = key.startswith("classifier") or key.endswith(".bias")
        wanted = plain[key] - 0.25 * parameter.grad * trains
        torch.testing.assert_close(model.get_parameter(key).double(), wanted, atol=2e-6, rtol=1e-5)
        moved += trains and not torch.equal(model.get_parameter(key), before[key])
        assert trains or torch.equal(model.get_parameter(key), before[key])
    assert moved > 4
    buffers = {key for key, _ in model.named_buffers()}
    same_tensors(
        {key: snapshot(model)[key] for key in buffers & set(before)},
        {key: before[key] for key in buffers & set(before)},
    )


def test_a_model_without_biases_is_refused():
    model = TINY_MODELS["resnet"]()
    for module in model.resnet.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(OptionError, match="no biases outside the head"):
        BitFitConfig().plan(model, State())
