"""Trained models and data for them."""

import datasets
import pytest

from tests.trained import trained_files


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return trained_files(tmp_path_factory.mktemp("inference"))
