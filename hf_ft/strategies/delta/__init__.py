"""DELTA."""

from hf_ft.strategies.delta.config import DELTAConfig

__all__ = [
    "DELTAConfig",
]
