"""What a row of the matrix shares: a tiny model of one class, its data, and the stock Trainer's results with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.testing.families import CLASSES, FAULTY, families, samples, tiny
from hf_ft.testing.training import snapshot
from hf_ft.zoo.models import from_pretrained

SOURCE_CLASSES = 5
BATCH, SAMPLES = 4, 8
TOLERANCE, ROUNDING = 2e-5, 1e-6


class Rows(torch.utils.data.Dataset):
    """Samples as a map-style dataset."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Subject:
    """A tiny model of one class, shared by all cells of its row."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.task, self.folder = name, families()[name], folder
        self._model = tiny(name)
        self.data = Rows(samples(self._model, SAMPLES))
        self.probe = samples(self._model, BATCH, seed=1)
        self.probe.pop("labels")

    def model(self) -> Any:
        return copy.deepcopy(self._model)

    def source_data(self) -> Rows:
        columns = samples(self._model, SAMPLES, seed=2)
        return Rows(columns | {"labels": torch.arange(SAMPLES) % SOURCE_CLASSES})

    def with_source_head(self) -> Any:
        """A model pretrained on other classes, loaded with a new head beside the old one."""
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return copy.deepcopy(self._loaded)

    @cached_property
    def _loaded(self) -> Any:
        saved = self.folder / "pretrained"
        tiny(self.name, num_labels=SOURCE_CLASSES).save_pretrained(saved)
        try:
            return from_pretrained(str(saved), num_labels=CLASSES, task=self.task)
        except Exception as error:  # raised again for the strategies that need the head
            return error

    def members(self) -> Any:
        """Two models as one if ensembles support the task; otherwise the model alone."""
        if self.task not in ("image", "text"):
            return self.model()
        return CollaborativeModel.from_members([self.model(), tiny(self.name, seed=1)])

    # --- the stock Trainer ---------------------------------------------------------------------------------

    @cached_property
    def stock(self) -> tuple[dict[str, Tensor], list[float]]:
        """The weights and losses after training with the stock Trainer."""
        return self._trained_by_stock("stock")

    def _trained_by_stock(self, folder: str) -> tuple[dict[str, Tensor], list[float]]:
        args = arguments(self.folder / folder, 4, optim="adamw_torch")
        trainer = Trainer(self.model(), args, train_dataset=self.data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return snapshot(trainer.model), losses(trainer)

    @cached_property
    def reproducible(self) -> bool:
        """Whether two runs of the stock Trainer end with the same weights: Reformer seeds itself from the clock."""
        again, _ = self._trained_by_stock("again")
        return all(torch.equal(value, again[name]) for name, value in self.stock[0].items())

    @cached_property
    def fault(self) -> str:
        """Why the class does not train with the stock Trainer, or does not reload with Transformers alone."""
        if self.name in FAULTY:
            return FAULTY[self.name]
        try:
            _, found = self.stock
        except Exception as error:  # whatever it is, it is not our fault
            return f"the stock Trainer fails: {told(error)}"
        return "" if all(map(math.isfinite, found)) else "the stock Trainer's loss is not finite"

    @cached_property
    def reload_fault(self) -> str:
        """Why a model that the stock Trainer trained does not reload, or reloads with other logits."""
        model = self.model()
        model.load_state_dict(self.stock[0])
        model.save_pretrained(self.folder / "stock" / "saved")
        try:
            gap = gap_of(self.logits(type(model).from_pretrained(self.folder / "stock" / "saved")), self.logits(model))
        except Exception as error:  # as above
            return told(error)
        return f"logits differ by {gap:.2g}" if gap > TOLERANCE else ""

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        torch.manual_seed(0)  # Reformer draws its hashes in eval mode too
        return model.eval()(**self.probe).logits


def arguments(folder: Path, steps: int, **more: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        **{"per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no"},
        **{"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    }
    return TrainingArguments(str(folder), max_steps=steps, dataloader_pin_memory=False, **(defaults | more))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gap_of(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value if that is above 1."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def told(error: Exception) -> str:
    """The beginning of a message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
