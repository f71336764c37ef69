"""Models for the commands that only look at them."""

from __future__ import annotations

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
