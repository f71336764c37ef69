"""Trains on a stream, and kills itself after a step: `killed_training_stream_worker.py FOLDER STEP`."""

import os
import signal
import sys

import torch
from transformers import TrainerCallback

from tests.trainer.test_training_stream import SAVING, made


class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
trainer = made(sys.argv[1], shuffle_buffer=8, **SAVING)
trainer.add_callback(KillAtStep())
trainer.train()
