"""Commits to the Hub, without the Hub."""

from typing import Any

import pytest
from transformers.utils import hub


class _Api:
    def __init__(self) -> None:
        self.files: list[str] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, operations: list[Any], **options: Any) -> None:
        self.files += sorted(operation.path_in_repo for operation in operations)


def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that is filled with the names of the files that `push_to_hub` commits."""
    api = _Api()
    monkeypatch.setattr(hub, "hf_api", lambda: api, raising=False)
    for name in ("create_repo", "create_commit"):  # as of older versions
        monkeypatch.setattr(hub, name, getattr(api, name), raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: hub.ModelCard("card"))
    return api.files
