"""Two ranks train on a stream: each sample once per pass, the same measured samples, resumed where each rank was.

The base of a PEFT model also serves as its reference there, and trains the same as a copy.
"""

import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model
from transformers import default_data_collator

import hf_ft.engine.frozen.reference
from hf_ft import DAFTConfig, DELTAConfig, FTTrainer
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments

folder = Path(sys.argv[1])
torch.set_num_threads(1)
COUNT = 24


def sums(rows):
    return [float(torch.as_tensor(row["pixel_values"]).double().sum()) for row in rows]


KNOWN = {total: number for number, total in enumerate(sums(tiny_data(tiny_resnet(), COUNT)))}


def made(name, shards, **more):
    """Two passes in 6 steps; what is read is recorded."""
    read = []

    def collate(rows):
        read.extend(KNOWN[total] for total in sums(rows))
        return default_data_collator(rows)

    args = tiny_arguments(
        folder / name, max_steps=6, per_device_train_batch_size=4, optim="sgd", save_strategy="steps", save_steps=2
    )
    assert args.world_size == 2
    data = tiny_data(tiny_resnet(), COUNT).to_iterable_dataset(num_shards=shards)
    return FTTrainer(tiny_resnet(), args, train_dataset=data, data_collator=collate, **more), read


for name, shards in (("shards", 4), ("samples", 3)):
    whole, read = made(name, shards, shuffle_buffer=5)
    whole.train()
    for begin in (0, COUNT // 2):
        together = [number for one in gather_object([read[begin : begin + COUNT // 2]]) for number in one]
        assert sorted(together) == list(range(COUNT)), together
    again, reread = made(name, shards, shuffle_buffer=5)
    again.train(resume_from_checkpoint=str(folder / name / "checkpoint-4"))
    assert reread == read[16:], (reread, read)
    same_tensors(snapshot(again.model), snapshot(whole.model))

measured, _ = made("measured", 4, strategy=DAFTConfig(), measure_samples=10)
assert measured.context().samples.count == 10
looks = gather_object([sums(measured.looked_at)])
assert looks[0] == looks[1] and len(looks[0]) == 10
tensors = measured.measure()["daft"].tensors
for key, value in tensors.items():
    assert bool((measured.accelerator.gather(value[None]) == value).all()), key

compared, find = [], hf_ft.engine.frozen.reference.adapters_of
for found in (find, lambda model: ()):
    hf_ft.engine.frozen.reference.adapters_of = found
    torch.manual_seed(0)
    tuner = LoraConfig(r=2, target_modules=r".*\.(query|value|q_proj|v_proj)", modules_to_save=["classifier"])
    model = get_peft_model(tiny_vit(), tuner)
    trainer = make_trainer(model, ["lp_ft", DELTAConfig(weights="uniform")], folder / "lora", "never", max_steps=4)
    trainer.train()
    assert bool(trainer._run.reference.adapters) == (found is find)
    compared.append(snapshot(trainer.model))
same_tensors(*compared)
