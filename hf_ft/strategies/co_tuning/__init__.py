"""Co-Tuning."""

from hf_ft.strategies.co_tuning.config import CoTuningConfig

__all__ = [
    "CoTuningConfig",
]
