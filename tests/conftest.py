"""Common to all tests: quiet, offline, one thread (tiny models gain nothing from more, and lose on a busy machine)."""

import gc
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import slow modules, except in the process that only distributes tests to workers, which wait for it."""
    if session.config.getoption("dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    from tests import forked

    forked.start()  # imports libraries, before the freeze below
    from hf_ft.core import config as registry
    from tests import quick

    quick.set_up()
    registry.strategies()  # ours register when first used: do it before a test replaces this table


# Files of a few slow tests, whose processes also take long: the last of these files would run alone.
FIRST = (
    "trainer/test_distributed.py",
    "docs/test_examples.py",
    "cli/test_demo.py",
    "comparison/test_tasks.py",
    "cli/test_shared_files.py",
    "test_startup.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files as workers should run them: slow ones first, the smallest last."""
    weight: Counter[Path] = Counter()
    for item in items:
        weight[item.path] += 20 if item.get_closest_marker("slow") else 1
    for path in weight:
        weight[path] += 20_000 * path.as_posix().endswith(FIRST)
    items.sort(key=lambda item: -weight[item.path])


@pytest.fixture
def shipped_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register only the package's own strategies: other tests add theirs when they are collected."""
    from hf_ft.core import config as registry

    own = {name: config for name, config in registry.strategies().items() if config.__module__.startswith("hf_ft.")}
    monkeypatch.setattr(registry, "_CONFIGS", own)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Freeze imported objects: each training run collects garbage, which would scan all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
