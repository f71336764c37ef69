"""Run the same strategies without a Trainer: the Objective in your own training loop with Accelerate.

python examples/raw_accelerate_loop.py
accelerate launch --multi_gpu --num_processes 2 examples/raw_accelerate_loop.py   (add --cpu without a GPU)
"""

import argparse

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

import hf_ft
from hf_ft.testing import tiny_data, tiny_resnet

EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    # With several stages, parameters that only a later one trains have no gradient before it.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=parser.parse_args().cpu, kwargs_handlers=[kwargs])

    model = tiny_resnet()  # any Transformers classifier
    loader = DataLoader(tiny_data(model), batch_size=8, shuffle=True)

    run = hf_ft.set_up(model, [hf_ft.LPFTConfig(), hf_ft.L2SPConfig()])
    objective = run.objective()
    optimizer = torch.optim.AdamW(run.param_groups(lr=3e-3, weight_decay=0.01))
    prepared, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    steps = EPOCHS * len(loader)
    scheduler = run.scheduler(optimizer, steps, "cosine")
    begin_step = run.stepper(objective, steps, optimizer=optimizer)

    step = 0
    for epoch in range(EPOCHS):
        prepared.train()
        for batch in loader:
            begin_step(step)  # advances through the stages
            outputs = prepared(**batch)  # task and terms in a single loss
            accelerator.backward(outputs["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
        terms = " ".join(f"{name} {float(value):.4f}" for name, value in outputs["terms"].items())
        accelerator.print(f"{accelerator.num_processes} process(es), epoch {epoch}: {terms}")
    run.finish().save_pretrained("runs/raw_loop", is_main_process=accelerator.is_main_process)


if __name__ == "__main__":
    main()
