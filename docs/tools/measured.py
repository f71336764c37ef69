"""Tables in docs/ of what the scripts in tests/benchmarks/ measured, made from the files that they wrote."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
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


def table_of_cpu_formats(table: Table) -> str:
    """What channels-last images and bfloat16 save on a CPU, from tests/benchmarks/cpu_formats.py."""
    content = _read("cpu_formats.json")
    if content is None:
        return NOT_YET
    titles = {"train": "training step", "predict": "prediction"}
    rows = [
        (name, titles[kind], *(_of_three(ways[way]) for way in list(ways)[1:]))  # the first is the plain one
        for name, kinds in content["rows"].items()
        for kind, ways in kinds.items()
    ]
    about = content["about"]
    where = (
        f"Medians of {about['rounds']} rounds (smallest to largest), {about['images']} images per batch, one thread; a "
        f"processor with {about['processor']}; torch {about['torch']}."
    )
    return table(("network", "", "channels last", "bfloat16", "both"), rows) + "\n\n" + where


def _of_three(values: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def table_of_cpu_scores(table: Table) -> str:
    """Test scores in float32 and in bfloat16, from the same script."""
    file = RESULTS / "cpu_formats.jsonl"
    if not file.is_file():
        return NOT_YET
    found: dict[tuple[str, str], dict[bool, dict[int, float]]] = {}
    for entry in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        both = found.setdefault((entry["model"], entry["strategy"]), {True: {}, False: {}})
        both[entry["bf16"]][entry["seed"]] = entry["test"]
    rows = []
    for (model, strategy), both in found.items():
        seeds = sorted(both[True].keys() & both[False].keys())
        if not seeds:
            continue
        differences = [both[True][seed] - both[False][seed] for seed in seeds]
        means = (statistics.fmean(both[low][seed] for seed in seeds) for low in (False, True))
        spread = statistics.stdev(differences) if len(seeds) > 1 else 0.0
        shown = f"{statistics.fmean(differences):+.3f} ± {spread:.3f}"
        rows.append((model, strategy, *(f"{mean:.3f}" for mean in means), shown, str(len(seeds))))
    return table(("network", "strategy", "float32", "bfloat16", "difference", "seeds"), rows)


def table_of_augmentation(table: Table) -> str:
    """The scores with each way of augmenting or mixing images, from tests/benchmarks/augmentation.py."""
    file = RESULTS / "augmentation.jsonl"
    if not file.is_file():
        return NOT_YET
    found: dict[tuple[str, int, str], dict[str, dict[int, float]]] = {}
    for entry in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        ways = found.setdefault((entry["task"], entry["epochs"], entry["strategy"]), {})
        ways.setdefault(entry["way"], {})[entry["seed"]] = entry["test"]
    columns = sorted(found, key=lambda key: (key[0], key[1]))
    titles = {"cifar10": "CIFAR-10", "mnist": "MNIST", "digits": "UCI digits", "elpv": "ELPV"}
    head = [f"{titles.get(task, task)}, {epochs} epochs, {strategy}" for task, epochs, strategy in columns]
    rows = [
        (way, *(_of_way(found[key], way) for key in columns))
        for way in dict.fromkeys(w for f in found.values() for w in f)
    ]
    return table(("images", *head), rows)


def _of_way(ways: dict[str, dict[int, float]], way: str) -> str:
    """The mean score of a way, with its mean difference per seed from unchanged images and the standard error."""
    scores, plain = ways.get(way, {}), ways.get("none", {})
    if not scores:
        return ""
    mean = f"{statistics.fmean(scores.values()):.3f}"
    differences = [scores[seed] - plain[seed] for seed in scores.keys() & plain.keys()]
    if way == "none" or len(differences) < 2:
        return mean
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean} ({statistics.fmean(differences):+.3f} ± {error:.3f})"


def table_of_step_times(table: Table) -> str:
    """Step time and peak memory of every strategy, from tests/benchmarks/step_times.py."""
    content = _read("step_times.json")
    if content is None:
        return NOT_YET
    whole = content["rows"].get("full", {}).get("peak_mb")
    rows = []
    for name, row in content["rows"].items():
        peak = row.get("peak_mb")
        shown = "" if peak is None else f"{peak:.0f} MB"
        share = f"{peak / whole:.2f}" if peak is not None and whole else ""
        rows.append((name, _interval(row["full"], 3), _interval(row["floor"], 2), shown, share))
    headers = ("strategy: stage", "step / full", "step / floor", "peak memory", "peak / full")
    notes = [f"Left out: {name} ({reason})." for name, reason in content["left_out"].items()]
    unknown = sum("peak_mb" not in row for row in content["rows"].values())
    if unknown:
        notes.append(f"Rows whose peak memory is not measured yet: {unknown}.")
    notes.append(f"{content['about']['pairs']} rounds, {_where(content['about'])}")
    return "\n\n".join([table(headers, rows), *notes])


def table_of_gpu(table: Table, content: dict[str, Any] | None = None) -> str:
    """What tests/gpu/check.py found on a GPU: the laws, and the cost of every strategy."""
    content = _read("gpu.json") if content is None else content
    if content is None:
        return "Not run on a GPU yet, so there are no figures."
    laws = [
        (e["law"], e["precision"], str(e["kept"]), ", ".join(e["broken"]), str(e["not_run"] or ""))
        for e in content["laws"]
    ]
    parts = [table(("law", "precision", "kept by", "broken by", "not run"), laws)]
    rows = [(name, *_of_gpu_row(row)) for name, row in content["rows"].items() if row is not None]
    headers = ("strategy: stage", "step / full", "step / floor", "peak memory", "peak / full", "peak / floor", "waits")
    if rows:
        parts.append(table(headers, rows))
    late = [name for name, row in content["rows"].items() if row is None]
    if late:
        parts.append(f"Time ran out before: {', '.join(late)}.")
    about = content["about"]
    versions = [f"torch {about['torch']}", f"transformers {about['transformers']}"]
    versions += [f"CUDA {about['cuda']}", f"driver {about.get('driver') or 'unknown'}"] if about.get("cuda") else []
    parts.append(f"{about['device']}, {', '.join(versions)}; {about['geometry']}; {about['rounds']} rounds.")
    return "\n\n".join(parts)


def _of_gpu_row(row: dict[str, Any]) -> tuple[str, ...]:
    memory = row.get("memory")
    peaks = ("", "", "")
    if memory is not None:
        peaks = f"{memory['mb']:.0f} MB", f"{memory['full']:.2f}", f"{memory['floor']:.2f}" if memory["floor"] else ""
    return _interval(row["full"], 3), _interval(row["floor"], 2), *peaks, row.get("waits") or ""


def _interval(ratio: dict[str, float] | None, digits: int) -> str:
    """A median and its 95 % interval."""
    if ratio is None:
        return ""
    return f"{ratio['ratio']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


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
        same = "the same order" if search["same ranking with and without the cache"] else "different orders"
        notes.append(
            f"With and without the cache, the search ranks the blocks in {same} (largest difference in a score: "
            f"{search['largest difference of a score']:.1e}). The exhaustive search chose {search['best']}, which "
            f"scores {search['exhaustive score of the best']:.3f}; halving chose {search['chosen by halving']}, which "
            f"the exhaustive search scores {search['exhaustive score of that']:.3f}."
        )
    runs = {part: len(next(iter(content[part]["seconds"].values()))) for part in epochs if part in content}
    counted = ", ".join(f"{part}: {number} run{'s' if number > 1 else ''}" for part, number in runs.items())
    notes.append(f"Medians over all runs ({counted}), {_where(about)}")
    return "\n\n".join([table(("ratio of times", "measured", "goal"), rows), *notes])


def table_of_strategies(table: Table, name: str) -> str:
    """A strategy beside its ablations and baselines, from tests/benchmarks/strategies.py."""
    runs = _read_lines("strategies.jsonl")
    parts = []
    for task, (title, other) in TASKS.items():
        rows = [row for row in (_row(runs, task, strategy) for strategy in SHOWN[name]) if row]
        if rows:
            headers = ("strategy", "validation", "test", f"out of distribution ({other})", "rates", "seconds per run")
            parts.append(f"**{title}**\n\n{table(headers, rows)}")
    return "\n\n".join(parts) or NOT_YET


REGULARISED = {
    "digits_5": "Near: digits 0-4 -> 5-9, 5 images per class",
    "digits_10": "Near: digits 0-4 -> 5-9, 10 images per class",
    "digits_20": "Near: digits 0-4 -> 5-9, 20 images per class",
    "poly_50": "Near: ELPV mono -> poly, 50 images",
    "poly_200": "Near: ELPV mono -> poly, 200 images",
    "elpv_100": "Far: ImageNet -> ELPV, 100 images",
    "elpv_500": "Far: ImageNet -> ELPV, 500 images",
}
EVAL = "BatchNorm in eval mode: "


def table_of_regularisers(table: Table) -> str:
    """Strategies over tasks, and each one's mean difference from plain fine-tuning, from regularisers.py."""
    runs = _read_lines("regularisers.jsonl")
    if not runs:
        return NOT_YET
    parts = []
    names = list(dict.fromkeys(run["strategy"] for run in runs))
    tasks = [task for task in REGULARISED if any(run["task"] == task for run in runs)]
    for title, chosen in (
        ("BatchNorm in train mode, as in papers and for most users", [n for n in names if not n.startswith(EVAL)]),
        ("BatchNorm in eval mode, on both sides", [n for n in names if n.startswith(EVAL)]),
    ):
        rows = [_regularised(runs, name, tasks, chosen[0]) for name in chosen]
        shown = [t for i, t in enumerate(tasks) if any(row[i + 1] for row in rows)]
        rows = [(row[0], *(row[tasks.index(t) + 1] for t in shown), row[-1]) for row in rows]
        parts.append(f"**{title}**\n\n{table(('strategy', *shown, 'mean difference from full'), rows)}")
    legend = "\n".join(f"- `{task}`: {REGULARISED[task]}." for task in tasks)
    return "\n\n".join([legend, *parts])


def _regularised(runs: list[dict[str, Any]], name: str, tasks: list[str], base: str) -> tuple[str, ...]:
    cells, differences = [], []
    for task in tasks:
        found = {r["seed"]: r["test"] for r in runs if r["task"] == task and r["strategy"] == name and r["final"]}
        plain = {r["seed"]: r["test"] for r in runs if r["task"] == task and r["strategy"] == base and r["final"]}
        cells.append(_mean_std(list(found.values())) if found else "")
        differences += [found[seed] - plain[seed] for seed in found if seed in plain]
    shown = "" if name == base or not differences else _difference(differences)
    return (name.removeprefix(EVAL), *cells, shown)


def _difference(values: list[float]) -> str:
    """Mean and standard error, in points."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.fmean(values):+.1f} ± {100 * error:.1f} ({len(values)} pairs)"


def table_of_disentangling(table: Table) -> str:
    """How P and N share F between them, on the tasks of regularisers.py."""
    runs = [run for run in _read_lines("regularisers.jsonl") if run["final"] and "disentangled" in run]
    if not runs:
        return NOT_YET
    rows = []
    for name in dict.fromkeys(run["strategy"] for run in runs if not run["strategy"].startswith(EVAL)):
        for task in (task for task in REGULARISED if any(r["task"] == task for r in runs)):
            chosen = [r for r in runs if r["strategy"] == name and r["task"] == task]
            if chosen:
                figures = [f"{statistics.fmean(r['disentangled'][key] for r in chosen):.2f}" for key in FIGURES]
                sound = sum(not r["verdict"] for r in chosen)
                rows.append((name, task, *figures, f"{sound} of {len(chosen)}"))
    return table(("strategy", "task", *FIGURES.values(), "sound"), rows)


FIGURES = {
    "p_share": "norm of P / F",
    "n_share": "norm of N / F",
    "f_label": "label's share of the variance of F",
    "p_label": "of P",
    "n_label": "of N",
    "accuracy": "classifier's training accuracy",
}


SOFT = {
    "digits_50": "MNIST digits 0-6 -> UCI digits 0-6, 50 images",
    "digits_100": "the same, 100 images",
    "digits_200": "the same, 200 images",
    "digits_100_biased": "the same, 100 images, each class two thirds the size of the previous one (36 to 3)",
    "poly_100": "ELPV mono -> poly, 100 images",
    "poly_300": "ELPV mono -> poly, 300 images",
}
UNSEEN = {
    "uci_789": "digits 7-9 of UCI, the target's domain",
    "mnist_789": "digits 7-9 of MNIST, the source's domain",
    "uci_digits": "all ten UCI digits, neither the source's nor the target's domain",
}


def table_of_soft(table: Table) -> str:
    """Accuracy, speed and general discrimination of soft fine-tuning and its controls, from soft.py."""
    runs = [run for run in _read_lines("soft.jsonl") if run["final"]]
    if not runs:
        return NOT_YET
    methods = list(dict.fromkeys(run["method"] for run in runs if "curve" in run))
    others = list(dict.fromkeys(run["method"] for run in runs if "curve" not in run))  # not trained
    tasks = [task for task in SOFT if any(run["task"] == task and "curve" in run for run in runs)]

    def of(task: str, method: str) -> list[dict[str, Any]]:
        return [run for run in runs if run["task"] == task and run["method"] == method]

    kinds = list(dict.fromkeys(task.split("_")[0] for task in tasks))
    accuracy = []
    for method in [*methods, *others]:
        cells = [_mean_std([run["test"] for run in of(task, method)]) if of(task, method) else "" for task in tasks]
        for kind in kinds:
            pairs = [
                one["test"] - other["test"]
                for task in tasks
                if task.startswith(kind)
                for one in of(task, method)
                for other in of(task, methods[0])
                if one["seed"] == other["seed"]
            ]
            cells.append("" if method == methods[0] or len(pairs) < 2 else _difference(pairs))
        accuracy.append((method, *cells))
    steps = [(m, *(_steps_to(of(task, m), of(task, methods[0])) for task in tasks)) for m in methods]
    parts = [
        "\n".join(f"- `{task}`: {SOFT[task]}." for task in tasks),
        "**Balanced accuracy on test**",
        table(("method", *tasks, *(f"{kind}: mean difference from full" for kind in kinds)), accuracy),
        "**Steps until the validation accuracy reaches 90 % of plain fine-tuning's final one**",
        table(("method", *tasks), steps),
        "**General discrimination after training: linear probe / nearest class mean, on classes in neither loss**",
        _table_of_discrimination(table, tasks, methods, of),
        "**Change in this linear probe's accuracy due to training, over all tasks, in points**",
        _table_of_changes(table, methods, runs),
    ]
    return "\n\n".join(parts)


def _table_of_discrimination(
    table: Table, tasks: list[str], methods: list[str], of: Callable[[str, str], list[dict[str, Any]]]
) -> str:
    columns = [(task, name) for task in tasks for name in of(task, methods[0])[0]["discrimination"][0][1]]

    def cell(task: str, name: str, method: str, place: int) -> str:
        found = [run["discrimination"][place][1][name] for run in of(task, method)]
        return " / ".join(f"{statistics.fmean(values):.2f}" for values in zip(*found, strict=True))

    rows = [("before training", *(cell(task, name, methods[0], 0) for task, name in columns))]
    rows += [(method, *(cell(task, name, method, -1) for task, name in columns)) for method in methods]
    legend = "\n".join(f"- `{name}`: {UNSEEN[name]}." for name in dict.fromkeys(name for _, name in columns))
    return table(("method", *(f"{task}: {name}" for task, name in columns)), rows) + "\n\n" + legend


def _table_of_changes(table: Table, methods: list[str], runs: list[dict[str, Any]]) -> str:
    rows = []
    for method in methods:
        cells = []
        for name in UNSEEN:
            found = [run["discrimination"] for run in runs if run["method"] == method and "discrimination" in run]
            changes = [by[-1][1][name][0] - by[0][1][name][0] for by in found if name in by[0][1]]
            cells.append(_difference(changes).replace("pairs", "runs") if len(changes) > 1 else "")
        rows.append((method, *cells))
    return table(("method", *UNSEEN), rows)


def _steps_to(runs: list[dict[str, Any]], plain: list[dict[str, Any]], share: float = 0.9) -> str:
    """The mean first step that reaches this share of plain fine-tuning's final accuracy with the same seed."""
    ends = {run["seed"]: run["curve"][-1][1] for run in plain}
    pairs = [(run, share * ends[run["seed"]]) for run in runs if run["seed"] in ends]
    reached = [next((step for step, value in run["curve"] if value >= goal), None) for run, goal in pairs]
    found = [step for step in reached if step is not None]
    missed = f" ({len(reached) - len(found)} of {len(reached)} never)" if len(found) < len(reached) else ""
    return (f"{statistics.fmean(found):.0f}" if found else "") + missed


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


def _read_lines(name: str) -> list[dict[str, Any]]:
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _read(name: str) -> dict[str, Any] | None:
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
