"""Common to all tests: quiet, offline, one thread (tiny models gain nothing from more, and lose on a busy machine)."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: F401  # with what follows, before the freeze below
import peft  # noqa: F401
import pytest
import sklearn.svm  # noqa: F401
import torch
from transformers.utils import logging

from hf_ft.core import config as registry
from tests import quick

quick.set_up()
registry.strategies()  # ours register at the first look: before a test puts another table in place of this one


@pytest.fixture
def shipped_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the package's own strategies are registered: other tests add theirs when they are collected."""
    own = {name: config for name, config in registry.strategies().items() if config.__module__.startswith("hf_ft.")}
    monkeypatch.setattr(registry, "_CONFIGS", own)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What is imported stays: each training collects garbage, which would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
