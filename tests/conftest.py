"""Common to all tests: quiet, offline, one thread (tiny models gain nothing from more, and lose on a busy machine)."""

import gc
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: F401  # with what follows, before the freeze below
import peft  # noqa: F401
import pytest
import sklearn.svm  # noqa: F401
import sqlalchemy
import torch
from torch.utils.data import _utils
from transformers.utils import logging

from hf_ft.core import config as registry

# A data loader that is garbage within a cycle, as a Trainer's is, waits this long for each of its workers: usually 5 s.
_utils.MP_STATUS_CHECK_INTERVAL = 0.2


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def _not_synchronous(connection: Any, _: Any) -> None:
    """Trials need not outlive a failure of power: what a killed process has committed stays all the same."""
    if type(connection).__module__ == "sqlite3":
        connection.execute("PRAGMA synchronous=OFF")


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
