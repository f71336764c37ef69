"""Commands run without traces of earlier ones."""

import logging

import datasets
import pytest

from tests.comparison.small_comparison import any_temperature


@pytest.fixture(autouse=True)
def clean(tmp_path_factory, monkeypatch):
    """No cache, no network, and none of our log handlers left behind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_FT_TRACEBACK", raising=False)
    yield
    logging.getLogger("hf_ft").handlers.clear()


@pytest.fixture
def temperatures():
    """A handful of validation samples is enough for a temperature."""
    with any_temperature():
        yield
