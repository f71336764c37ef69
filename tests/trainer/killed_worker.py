"""Trains, and kills itself with SIGKILL: `killed_worker.py FOLDER step|save AT`."""

import os
import signal
import sys

from transformers import TrainerCallback

from hf_ft import EMAConfig, L2SPConfig, LPFTConfig
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import make_trainer


class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)


folder, where, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
strategy = [LPFTConfig(), L2SPConfig(), EMAConfig()]
trainer = make_trainer(tiny_resnet(), strategy, folder, save_strategy="steps", save_steps=2)
if where == "step":
    trainer.add_callback(KillAtStep())
else:
    save = trainer._save_rng_state

    def killed(output_dir):
        if trainer.state.global_step == at:  # the weights are written, the random state is not
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_rng_state = killed
trainer.train()
