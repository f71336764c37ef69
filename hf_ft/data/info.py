"""What a model card says about the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hf_ft.models.hub import base_model_id
from hf_ft.zoo.datasets import DATASETS


@dataclass(frozen=True)
class DataInfo:
    """What a model card says about the data.

    Attributes:
        name: display name of the data set, or of its folder or file; never a path.
        hub_id: id on the Hub, if it comes from there.
        sizes: number of samples by split.
        notices: licence and source, where known.
        augment: augmentation of the training images.
    """

    name: str
    hub_id: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    augment: str = "none"

    @classmethod
    def of(cls, source: str, sizes: Mapping[str, int], notices: tuple[str, ...] = ()) -> DataInfo:
        """For data given as in :func:`hf_ft.data.load_splits`: a short name, a folder or file, or a Hub id."""
        if source in DATASETS:
            return cls(source, None, sizes, notices)
        if Path(source).expanduser().exists():
            return cls(Path(source).expanduser().resolve().name, None, sizes, notices)
        if "/" in source and base_model_id(source):
            return cls(source, source, sizes, notices)
        return cls(Path(source).name, None, sizes, notices)

    def __str__(self) -> str:
        sizes = ", ".join(f"{count:,} {split}" for split, count in self.sizes.items())
        name = f"[{self.name}](https://huggingface.co/datasets/{self.hub_id})" if self.hub_id else f"`{self.name}`"
        augmented = [] if self.augment == "none" else [f"Training images were augmented: {self.augment}."]
        return " ".join([f"Data: {name}{f' ({sizes})' if sizes else ''}.", *augmented, *self.notices])
