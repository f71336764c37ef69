"""Compose strategies: first a linear probe, then everything, pulled towards the pretrained weights throughout.

    python examples/compose.py --model microsoft/resnet-18

Without --model, a small random ResNet on random images shows how the terms and learning rates evolve.
"""

import argparse

from transformers import AutoModelForImageClassification, TrainingArguments

from hf_ft import FTTrainer, L2SPConfig, LPFTConfig
from hf_ft.testing import tiny_data, tiny_resnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; default: a tiny random ResNet")
    parser.add_argument("--output_dir", default="runs/compose")
    options = parser.parse_args()

    model = AutoModelForImageClassification.from_pretrained(options.model) if options.model else tiny_resnet()
    trainer = FTTrainer(
        model,
        TrainingArguments(
            options.output_dir,
            learning_rate=3e-3,
            num_train_epochs=6,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),  # fmt: skip
        # Terms add up; at most one strategy decides which parameters train when (here LP-FT).
        strategy=[LPFTConfig(probe=0.5, head_lr=0.03), L2SPConfig(alpha=0.1)],
        train_dataset=tiny_data(model),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            shown = " ".join(f"{name} {entry[name]:.4f}" for name in ("loss/task", "loss/l2_sp", "loss/l2_head"))
            print(f"step {entry['step']:2d}  stage {entry['stage']}  rate {entry['learning_rate']:.4f}  {shown}")


if __name__ == "__main__":
    main()
