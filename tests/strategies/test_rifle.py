"""Everything trains throughout; only the head is reinitialised, at equal intervals."""

import pytest
import torch

from hf_ft import FTTrainer, RIFLEConfig
from hf_ft.testing import TINY_MODELS, tiny_data
from hf_ft.testing.training import tiny_arguments

STEPS, RATE = 8, 0.05
PLAIN = {"max_steps": STEPS, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": RATE}
PLAIN |= {"max_grad_norm": 0.0, "weight_decay": 0.0, "per_device_train_batch_size": 32}


class Watched(FTTrainer):
    """Keeps the weights before each step, and the gradients of the step."""

    def training_step(self, model, *args, **kwargs):
        self.before = getattr(self, "before", [])
        self.gradients = getattr(self, "gradients", [])
        self.before.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        loss = super().training_step(model, *args, **kwargs)
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})
        return loss


@pytest.mark.parametrize("name", ["resnet", "bert"])
@pytest.mark.parametrize("times", [1, 3])
def test_only_the_head_is_reinitialised(name, times, tmp_path):
    model = TINY_MODELS[name]()
    args = tiny_arguments(tmp_path, **PLAIN)
    trainer = Watched(model, args, strategy=RIFLEConfig(times=times), train_dataset=tiny_data(model))
    trainer.train()
    redrawn = {STEPS * k // (times + 1) for k in range(1, times + 1)}
    heads = []
    for step in range(1, STEPS):
        for key, now in trainer.before[step].items():
            followed = trainer.before[step - 1][key] - RATE * trainer.gradients[step - 1][key]
            drawn = step in redrawn and key.startswith("classifier")
            if drawn and key.endswith("weight"):
                assert not torch.allclose(now, followed, atol=1e-3)
                heads.append(now)
            elif drawn:
                assert float(now.abs().max()) == 0 or name == "resnet"  # as each class initialises biases
                assert not torch.allclose(now, followed, atol=1e-3)
            else:
                torch.testing.assert_close(now, followed, atol=1e-6, rtol=1e-5)
    assert len(heads) == times
    for head in heads:
        assert name == "resnet" or 0.5 < float(head.std()) / model.config.initializer_range < 1.5
    assert all(not torch.equal(heads[0], other) for other in heads[1:])
