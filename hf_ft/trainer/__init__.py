"""The Trainer that runs fine-tuning strategies."""

from hf_ft.trainer.trainer import ClassWeights, FTTrainer

__all__ = [
    "ClassWeights",
    "FTTrainer",
]
