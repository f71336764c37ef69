"""Common to all tests: quiet, offline, two threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(2)
    logging.disable_progress_bar()
