"""Bi-tuning."""

from hf_ft.strategies.bi_tuning.config import BiTuningConfig

__all__ = [
    "BiTuningConfig",
]
