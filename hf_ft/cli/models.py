"""Models for the commands that only look at them, and how to load an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hf_ft.errors import OptionError
from hf_ft.models.tasks import auto_model, tasks_of
from hf_ft.zoo.models import SHORT_NAMES, load_model
from hf_ft.zoo.reading import read_config


def skeleton(name: str) -> nn.Module:
    """A classifier for inspection. For a Hub id or a folder only the config is read: no weights, no memory."""
    if name in SHORT_NAMES:
        return load_model(name)[0]
    config = read_config(name)
    tasks = tasks_of(config)
    if not tasks:
        raise OptionError(f"{name} ({type(config).__name__}) is not an image, text, audio or video classifier.")
    with torch.device("meta"):
        return auto_model(tasks[0]).from_config(config)


def adapter_usage(folder: str | Path) -> str:
    """How to load an adapter onto its base model with PEFT alone."""
    return (
        "from peft import PeftModel\n\n"
        "# base: the pretrained model with a head for the same number of classes\n"
        f'model = PeftModel.from_pretrained(base, "{folder}")'
    )
