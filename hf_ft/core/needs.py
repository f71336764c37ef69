"""Requirements of a strategy beyond a model and data, declared once for all callers that provide them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Requirements of a strategy, as declared by :meth:`hf_ft.FTConfig.needs`.

    Attributes:
        source_head: whether it needs the pretrained head in addition to the new one.
        source_data: whether it can use, or requires, pretraining data.
        without_source_data: the alternative, as the end of a sentence that asks for such a data set.
        several_members: whether it supports ensembles.
        evaluation_data: whether it makes a choice on evaluation data after training.
        without_evaluation_data: the alternative, as the end of a sentence that asks for them.
        hard_labels: whether one of its terms needs the class of each training sample. It is then refused together
            with mixup and CutMix, whose labels ``view.batch["labels"]`` are shares of two classes, (B, C).
        sharded: whether it can train a model whose parameters are sharded over the processes (FSDP2). It measures the
            model while that is still whole, and may change it by surgery, but neither by ``finalise`` nor during
            training; its terms compare no layers, have no parameters, and pass sums over weights to ``view.summed``.
    """

    source_head: bool = False
    source_data: Literal["no", "optional", "required"] = "no"
    without_source_data: str = ""
    several_members: bool = False
    evaluation_data: bool = False
    without_evaluation_data: str = ""
    hard_labels: bool = False
    sharded: bool = False
