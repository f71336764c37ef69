"""The values of the terms before the first step, on real images: `python tests/benchmarks/at_start.py`.

An ImageNet MobileNetV2 on 32 solar cells (ELPV) at 64 px, each term at its default weight (TRED's plain regulariser
at 0.01): in eval mode, in train mode, in train mode with BatchNorm converted first (to the statistics of 500 cells),
and in train mode with only BatchNorm in eval mode.
"""

from __future__ import annotations

import tempfile

import torch
from cells import channels_last
from common import PIXELS, quiet, ready
from datasets import Dataset

from hf_ft import AttentionTransferConfig, BSSConfig, DAFTConfig, DELTAConfig, FTTrainer, FullConfig, TREDConfig
from hf_ft.core.config import FTConfig
from hf_ft.splits import stratified_split
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.datasets import elpv
from hf_ft.zoo.models import load_model

TERMS = {
    "attention_transfer": AttentionTransferConfig(),
    "delta": DELTAConfig(weights="uniform"),
    "tred": TREDConfig(criterion="none", alpha=0.01),
    "bss": BSSConfig(),
}
WITH: dict[str, list[FTConfig]] = {
    "eval mode": [],
    "train mode": [],
    "train mode, BatchNorm converted": [DAFTConfig(zero_head=False)],
    "train mode, BatchNorm in eval mode": [FullConfig(norm_mode="eval")],
}


def main() -> None:
    quiet()
    cells: Dataset = stratified_split(elpv(), 500, 32, 32)["train"]
    for setting, others in WITH.items():
        shown = []
        for name, config in TERMS.items():
            model, processor = load_model("mobilenet_v2", num_labels=2, image_size=PIXELS)
            data = ready({"train": cells}, processor)["train"]
            with tempfile.TemporaryDirectory() as folder:
                args = tiny_arguments(folder, per_device_train_batch_size=32, remove_unused_columns=False)
                trainer = FTTrainer(
                    model, args, strategy=[*others, config], train_dataset=data, data_collator=channels_last
                )
                objective = trainer._start_run().objective().train()
            if setting == "eval mode":
                objective.model.eval()
            torch.manual_seed(0)  # of dropout
            terms = objective(**channels_last([data[row] for row in range(32)]))["terms"]
            shown.append(f"{name} {terms[name].item():.3g} (task {terms['task'].item():.2f})")
        print(f"{setting:36s}{', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
