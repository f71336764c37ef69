"""Tables in docs/ of what the scripts in tests/benchmarks/ measured, made from the files that they left."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
NOT_YET = "Not measured yet."
TASKS = {
    "elpv": ("ELPV, 500 monocrystalline cells, 64 px", "poly"),
    "mnist": ("MNIST, 200 images, 64 px", "UCI digits"),
}
SHOWN = {
    "daft": ("daft", "daft, no conversion", "daft, equal rates", "daft, head not zeroed", "full", "lp_ft"),
    "blockwise": (
        "blockwise, auto",
        "blockwise, last quarter",
        "linear_probe (head only)",
        "blockwise, all",
        "full",
        "lp_ft",
    ),
}
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def table_of_steps(table: Table) -> str:
    """The figures of tests/benchmarks/steps.py."""
    content = _read("steps.json")
    if content is None:
        return NOT_YET
    rows = [
        (
            name,
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"<= {row['goal']}" if row["goal"] else "",
        )
        for name, row in content["rows"].items()
    ]
    about = content["about"]
    where = f"{about['pairs']} pairs, {_where(about)}"
    return table(("ratio of step times", "median", "95 % interval", "goal"), rows) + "\n\n" + where


def table_of_frozen(table: Table) -> str:
    """The figures of tests/benchmarks/frozen.py."""
    content = _read("frozen.json")
    if content is None:
        return NOT_YET
    about = content["about"]
    epochs = {"probe": about["probe_epochs"], "search": about["search_epochs"]}
    rows, notes = [], []
    for part in ("probe", "search"):
        for name, (ratio, goal) in content.get(part, {}).get("ratios", {}).items():
            rows.append((f"{part}, {epochs[part]} epochs: {name}", f"{ratio:.2f}", str(goal)))
    search = content.get("search")
    if search:
        same = "the same" if search["same ranking with and without the cache"] else "another"
        notes.append(
            f"With and without the cache the search ranks the blocks in {same} order (largest difference of a score: "
            f"{search['largest difference of a score']:.1e}). Exhaustive: {search['best']}, "
            f"{search['exhaustive score of the best']:.3f}. Halving chose {search['chosen by halving']}, whose "
            f"exhaustive score is {search['exhaustive score of that']:.3f}."
        )
    runs = {part: len(next(iter(content[part]["seconds"].values()))) for part in epochs if part in content}
    counted = ", ".join(f"{part}: {number} run{'s' if number > 1 else ''}" for part, number in runs.items())
    notes.append(f"Medians over all runs ({counted}), {_where(about)}")
    return "\n\n".join([table(("ratio of times", "measured", "goal"), rows), *notes])


def table_of_strategies(table: Table, name: str) -> str:
    """A strategy beside its ablations and baselines, from tests/benchmarks/strategies.py."""
    file = RESULTS / "strategies.jsonl"
    if not file.exists():
        return NOT_YET
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    parts = []
    for task, (title, other) in TASKS.items():
        rows = [row for row in (_row(runs, task, strategy) for strategy in SHOWN[name]) if row]
        if rows:
            headers = ("strategy", "validation", "test", f"out of distribution ({other})", "rates", "seconds a run")
            parts.append(f"**{title}**\n\n{table(headers, rows)}")
    return "\n\n".join(parts) or NOT_YET


def _row(runs: list[dict[str, Any]], task: str, strategy: str) -> tuple[str, ...] | None:
    final = [run for run in runs if run["task"] == task and run["strategy"] == strategy and run["final"]]
    if not final:
        return None
    blocks = Counter(run["block"] for run in final if "block" in run)
    named = f" ({', '.join(f'{b} x{n}' if n > 1 else b for b, n in blocks.items())})" if "auto" in strategy else ""
    rates = f"{final[0]['learning_rate']:.1e}"
    if _has_head_rate(strategy):
        rates += f", head {final[0]['head_lr']:.1e}"
    scores = tuple(_mean_std([run[split] for run in final]) for split in ("validation", "test", "ood"))
    return (strategy + named, *scores, rates, f"{statistics.fmean(run['seconds'] for run in final):.0f}")


def _has_head_rate(strategy: str) -> bool:
    return strategy == "lp_ft" or (strategy.startswith("daft") and "equal rates" not in strategy)


def _mean_std(values: list[float]) -> str:
    std = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{std}"


def _where(about: dict[str, Any]) -> str:
    return (
        f"torch {about['torch']}, transformers {about['transformers']}, {about['threads']} threads on a CPU; "
        f"{about['geometry']}."
    )


def _read(name: str) -> dict[str, Any] | None:
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
