"""Trains with a source stream, and kills itself: `killed_stream_worker.py FOLDER STEP [resume]`; step 0: never."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_ft import FTTrainer, SoftConfig
from hf_ft.testing import tiny_data, tiny_resnet
from hf_ft.testing.training import equipped, snapshot, tiny_arguments
from hf_ft.trainer.source_streams import SourceStreams

folder, step, resume = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
torch.set_num_threads(1)


class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)


def augmented(rows):
    return {**rows, "pixel_values": [torch.as_tensor(image) + random.random() for image in rows["pixel_values"]]}


config = SoftConfig(until=0.75)
model = equipped(tiny_resnet(), config)
arguments = tiny_arguments(folder, save_strategy="steps", save_steps=2, dataloader_num_workers=2)
trainer = FTTrainer(
    model,
    arguments,
    strategy=config,
    train_dataset=tiny_data(model),
    source_dataset=tiny_data(model, 20, seed=2).with_transform(augmented),
)
trainer.add_callback(KillAtStep())
draw = SourceStreams._next_of


def written(streams, name, *more):
    batch = draw(streams, name, *more)
    with (folder / "read.jsonl").open("a") as file:
        file.write(json.dumps(batch["pixel_values"].double().sum(dim=(1, 2, 3)).tolist()) + "\n")
    return batch


SourceStreams._next_of = written
folder.mkdir(exist_ok=True)
trainer.train(resume_from_checkpoint=resume)
torch.save(snapshot(trainer.model), folder / "weights.pt")
