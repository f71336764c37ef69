"""AMCF: several source models fine-tuned together."""

from hf_ft.strategies.amcf.config import AMCFConfig

__all__ = [
    "AMCFConfig",
]
