"""The one Trainer."""

from hf_ft.trainer.trainer import ClassWeights, FTTrainer

__all__ = [
    "ClassWeights",
    "FTTrainer",
]
