"""Block-wise fine-tuning."""

from hf_ft.strategies.blockwise.config import BlockwiseConfig

__all__ = [
    "BlockwiseConfig",
]
