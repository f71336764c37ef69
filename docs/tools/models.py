"""The matrix of docs/models.md: every classification class of Transformers, tiny, with every strategy.

    python -m docs.tools.models                    run the cells that are missing from docs/results/models.jsonl
    python -m docs.tools.models --only NAME,NAME   only for these classes
    python -m docs.tools.models --again            discard the stored results (for these classes), and run them again

Processes that run at the same time share the classes. ``python -m docs.tools.tables`` then writes the page.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import logging
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from filelock import FileLock, Timeout

from docs.tools.cells import cell
from docs.tools.subjects import Subject
from hf_ft.core.config import strategies
from hf_ft.testing.families import families

KEPT = Path(__file__).parents[1] / "results" / "models.jsonl"
SAMPLED = {"image": 6, "text": 8, "audio": 4, "video": 2}  # classes in the sample
Row = Mapping[str, Any]


def names_of_strategies() -> list[str]:
    return [name for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.strategies.")]


# --- stored results ---------------------------------------------------------------------------------------


def read(file: Path = KEPT) -> dict[tuple[str, str], Row]:
    """The stored rows, by class and strategy."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = (json.loads(line) for line in lines)
    return {(row["model"], row["strategy"]): row for row in rows}


def write(rows: Iterable[Row], file: Path = KEPT) -> None:
    """Write all rows, one per line, in the order of tasks, classes and strategies."""
    models, order = list(families()), names_of_strategies()
    known = [row for row in rows if row["model"] in models and row["strategy"] in order]
    known.sort(key=lambda row: (models.index(row["model"]), order.index(row["strategy"])))
    file.write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")


def sample() -> list[tuple[str, str]]:
    """A fixed sample of 40 cells: two for each of 20 classes, with every strategy included."""
    tasks, order = families(), itertools.cycle(names_of_strategies())
    models = []
    for task, count in SAMPLED.items():
        found = sorted((zlib.crc32(name.encode()), name) for name in tasks if tasks[name] == task)
        models += [name for _, name in found[:count]]
    return [(model, next(order)) for model in models for _ in range(2)]


# --- the run ----------------------------------------------------------------------------------------------


def run(models: Sequence[str], file: Path = KEPT) -> None:
    """Run the missing cells of these classes, except classes that another process is running."""
    claims = Path(tempfile.gettempdir(), f"hf_ft_models_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}")
    claims.mkdir(exist_ok=True)
    for name in models:
        try:
            with FileLock(claims / name, blocking=False):
                kept = read(file)
                missing = [one for one in names_of_strategies() if (name, one) not in kept]
                rows = list(cells_of(name, missing)) if missing else []
        except Timeout:
            continue
        with FileLock(claims / "file"):
            write([*read(file).values(), *rows], file)
        for row in rows:
            if row["outcome"] == "wrong":
                print(f"{name} {row['strategy']}: {row['reason']}", flush=True)


def cells_of(name: str, chosen: Iterable[str]) -> Iterator[Row]:
    """The cells of one class."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(name, Path(folder))
        for strategy in chosen:
            yield {**cell(subject, strategy), "transformers": hf.__version__}


def quiet() -> None:
    """Turn off progress bars and warnings, and exclude everything imported so far from garbage collection."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,NAME", help="class names, separated by commas")
    parser.add_argument("--again", action="store_true", help="discard their stored results first")
    given = parser.parse_args()
    models = given.only.split(",") if given.only else list(families())
    if unknown := set(models) - set(families()):
        raise SystemExit(f"--only: unknown classes {', '.join(sorted(unknown))}")
    quiet()
    if given.again:
        write(row for row in read().values() if row["model"] not in models)
    run(models)


if __name__ == "__main__":
    main()
