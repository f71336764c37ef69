"""Which splits the names of folders and data sets stand for: ``Training``, ``TEST``, ``val_set``, ``train2017``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

Role = Literal["train", "validation", "test"]
# In order of preference, if a source has several.
USUAL: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "validate", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
_ENDING = r"(?:[-_. ]?(?:set|split|data|dataset|images?|imgs?|samples?))?(?:[-_. ]?\d+)?$"
_NAMES = {role: [re.compile(rf"{name}{_ENDING}", re.IGNORECASE) for name in names] for role, names in USUAL.items()}


def role_of(name: str) -> Role | None:
    """The split that a name stands for, whatever its case and common endings; None for any other name."""
    return next((role for role in _NAMES if _preference(name, role) is not None), None)


def candidates(names: Collection[str], role: Role) -> list[str]:
    """The names that stand for a split and are preferred over the others: several only if none is the usual one."""
    ranked = {name: rank for name in names if (rank := _preference(name, role)) is not None}
    exact = [usual for usual in USUAL[role] if usual in ranked]
    return exact[:1] or [name for name in ranked if ranked[name] == min(ranked.values())]


def _preference(name: str, role: Role) -> int | None:
    return next((rank for rank, pattern in enumerate(_NAMES[role]) if pattern.match(name.strip())), None)
