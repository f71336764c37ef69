"""What a strategy needs beside a model and data, said once for all who provide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a strategy takes, as :meth:`hf_ft.FTConfig.needs` declares it.

    Attributes:
        source_head: whether it needs the pretrained head beside the new one.
        source_data: whether it can use, or cannot do without, a data set of the pretraining.
        without_source_data: what else can be done, at the end of a sentence that asks for such a data set.
        several_members: whether it also fits a model of several members side by side.
    """

    source_head: bool = False
    source_data: Literal["no", "optional", "required"] = "no"
    without_source_data: str = ""
    several_members: bool = False
