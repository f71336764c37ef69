"""Studies in a storage: created or joined, and rejected if they are damaged or have other settings."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_ft.errors import Error, OptionError
from hf_ft.search.environment import environment_error

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage


@contextmanager
def readable_study(name: str) -> Iterator[None]:
    """Name the study in place of what Optuna or SQLAlchemy raise about damaged content.

    Raises:
        OptionError: in place of their errors; errors of the machine, such as a full disk, pass.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except Error:
        raise
    except (LookupError, TypeError, ValueError, AssertionError, StorageInternalError, SQLAlchemyError) as error:
        if environment_error(error) is not None:
            raise
        reason = str(error.__cause__ or error).partition("\n")[0] or type(error).__name__
        raise OptionError(
            f"the study {name!r} in this storage is damaged ({reason}). Restore its file, or give another storage."
        ) from error


def open_study(storage: BaseStorage, name: str, halving: tuple[int, int] | None) -> Study:
    """Create or join a study.

    Args:
        storage: storage that holds the study.
        name: name of the study.
        halving: steps before the first pruning, and reduction factor; None disables pruning.
    """
    import optuna

    with readable_study(name):
        return optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # never used
            pruner=optuna.pruners.SuccessiveHalvingPruner(*halving) if halving else optuna.pruners.NopPruner(),
        )


def check_signature(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any], name: str) -> None:
    """Reject a study whose signature differs from ours.

    Raises:
        OptionError: if it differs; the message names the keys.
    """
    if theirs is None:
        raise OptionError(f"the study {name!r} already exists with other trials. Give another name or storage.")
    differences = _differences(theirs, ours)
    if differences:
        raise OptionError(
            f"the study {name!r} was created with other settings: {', '.join(differences)}. Give the same "
            "settings, or another output folder, study name or storage."
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for key in sorted({*theirs, *ours}):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new, f"{prefix}{key}.")
        elif json.dumps(old) != json.dumps(new):  # as text, NaN equals NaN
            differences.append(f"{prefix}{key} ({reprlib.repr(old)} there, {reprlib.repr(new)} here)")
    return differences


def as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Round-trip a dict through JSON.

    Raises:
        OptionError: if it contains anything but numbers, text, lists and dicts.
    """
    try:
        return json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what} is not a JSON dict: {error}. Use only numbers, text, lists and dicts.") from error
