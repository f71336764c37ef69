"""TRED: target-awareness representation disentanglement."""

from hf_ft.strategies.tred.config import TREDConfig

__all__ = [
    "TREDConfig",
]
