"""The first part of the report: winner, ranking, cost, out-of-distribution scores and the winner's errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_ft.comparison.report.sections.confusion import saved_run
from hf_ft.comparison.report.sections.mistakes import mistakes
from hf_ft.comparison.report.sections.verdict import cautions, verdict
from hf_ft.comparison.report.text import SPLIT_NAMES, interval, spread
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Standing, front_of, winner
from hf_ft.core.config import BASELINE, FTConfig, strategies
from hf_ft.documents.chart import Plot, Row, Rows, Series, linear_axis, log_axis
from hf_ft.documents.document import Block, Bullets, Figure, Listing, Section, Table, Text
from hf_ft.documents.text import NONE, code, duration, metric_name, names, score, seconds, signed
from hf_ft.documents.usage import adapter_usage, pipeline_usage

BEST_FOLDER = "best"  # the winner's folder, inside the report's folder


def outcome_sections(results: Results, standings: Sequence[Standing]) -> list[Section]:
    """All non-empty sections of this part."""
    sections = [
        result(results, standings),
        ranking(results, standings),
        cost(results, standings),
        out_of_distribution(results, standings),
    ]
    return [section for section in (*sections, mistakes(results, standings)) if section is not None]


def main_split(standings: Sequence[Standing]) -> str:
    """The split on which contenders are compared: test, otherwise validation."""
    return "test" if any("test" in standing.spreads for standing in standings if standing.rank) else "validation"


def kind_of(standing: Standing, best: Standing | None, open_: bool = False) -> str:
    """The marker style of a contender."""
    if best is not None and standing.name == best.name:
        return "win"
    return "base" if standing.name == BASELINE else "open" if open_ else "other"


def result(results: Results, standings: Sequence[Standing]) -> Section:
    """The result in plain words, and how to load the winner."""
    best = winner(results, standings)
    blocks: list[Block] = [Text(" ".join(verdict(results, standings)))]
    held_back = cautions(results, standings)
    if held_back:
        blocks += [Text("Limitations:"), Bullets(tuple(held_back))]
    run = saved_run(results, best) if best is not None and results.winner else None  # without one, no model is saved
    if best is None or run is None:
        return Section("result", "Result", tuple(blocks))
    one = f"Its run with seed {run.seed}" if len(best.contender.finished_runs) > 1 else "It"
    where = f"{one} is saved in {code(BEST_FOLDER)}, next to this report:"
    return Section("result", "Result", (*blocks, Text(where), Listing(usage(results), "python")))


def usage(results: Results, folder: str | Path = BEST_FOLDER, example: Path | None = None) -> str:
    """How to use the winner: with Transformers alone, unless it is an adapter or a model of this package."""
    best = next(contender for contender in results.contenders if contender.name == results.winner)
    known = [FTConfig.from_dict(config) for config in best.configs if config["ft_type"] in strategies()]
    if any(config.keeps_adapters() for config in known):
        return adapter_usage(folder)
    ensemble, plain = any(config.sources() for config in known), all(config.plain for config in known)
    registers = "the ensemble" if ensemble else "" if plain else "the model"
    return pipeline_usage(folder, str(results.data.get("task", "image")), example, registers=registers)


def ranking(results: Results, standings: Sequence[Standing]) -> Section:
    """The ranking table, and a chart of the intervals."""
    split, metric = main_split(standings), metric_name(results.metric)
    better = "higher is better" if results.greater_is_better else "lower is better"
    lead = (
        f"Ranked by mean validation {metric} ({better}); ties are broken by the later half of the epochs. Scores are "
        "mean ± standard deviation over seeds. Differences are relative to full fine-tuning with the same seeds, with "
        "95 % intervals (Student's t)."
    )
    figure = difference_figure(results, standings, split)
    more = (figure,) if figure else ()
    return Section("ranking", "Ranking", (Text(lead), ranking_table(results, standings, split), *more))


def ranking_table(results: Results, standings: Sequence[Standing], split: str) -> Table:
    """All contenders; those that did not finish come last."""
    best = winner(results, standings)
    splits = [
        s for s in ("validation", "test") if s == "validation" or any(s in standing.spreads for standing in standings)
    ]
    headers = ("strategy", "rank", *splits, f"difference on {split}", "95 % interval", "better / equal / worse")
    rows = []
    for standing in standings:
        difference = standing.differences.get(split)
        compared = (NONE, NONE, NONE)
        if standing.name == BASELINE:
            compared = ("baseline", NONE, NONE)
        elif difference is not None:
            tally = f"{difference.wins} / {difference.ties} / {difference.losses}"
            compared = (signed(difference.mean), interval(difference), tally)
        status = standing.contender.status
        place = str(standing.rank) if standing.rank else "a run failed" if status == "finished" else status
        scores = (spread(standing.spreads.get(name)) for name in splits)
        rows.append((_named(standing, best), place, *scores, *compared))
    strong = frozenset(i for i, standing in enumerate(standings) if best is not None and standing.name == best.name)
    return Table(f"Strategies by validation {metric_name(results.metric)}", headers, tuple(rows), strong)


def _named(standing: Standing, best: Standing | None) -> str:
    return standing.name + (" (winner)" if best is not None and standing.name == best.name else "")


def difference_figure(results: Results, standings: Sequence[Standing], split: str) -> Figure | None:
    """Differences from full fine-tuning with intervals; scores if there are no differences."""
    best, metric = winner(results, standings), metric_name(results.metric)
    ranked = [standing for standing in standings if standing.rank and split in standing.spreads]
    compared = any(split in standing.differences for standing in ranked)
    if len(ranked) < 2:
        return None
    rows, values = [], [0.0] if compared else []
    for standing in ranked:
        difference, scores = standing.differences.get(split), standing.spreads[split]
        if compared and standing.name == BASELINE:
            row = Row(standing.name, 0.0, "0", kind=kind_of(standing, best))
        elif compared and difference is not None:
            kind = kind_of(standing, best, not difference.excludes_zero)
            row = Row(standing.name, difference.mean, signed(difference.mean), difference.interval, kind)
        elif compared:
            row = Row(standing.name, None, "no common seed")
        else:
            ends = None if scores.std is None else (scores.mean - scores.std, scores.mean + scores.std)
            row = Row(standing.name, scores.mean, score(scores.mean), ends, kind_of(standing, best))
        rows.append(row)
        values += [*(row.interval or ()), *([] if row.value is None else [row.value])]
    what = f"difference in {metric} from full fine-tuning" if compared else f"{metric}, mean ± std"
    axis = linear_axis(values, "difference from full" if compared else metric, include=[0.0] if compared else [])
    lines = ((0.0, BASELINE),) if compared else ()
    about = "; ".join(f"{row.label} {row.text}" for row in rows)
    chart = Rows(f"{what[0].upper()}{what[1:]}, by strategy", about, tuple(rows), axis, lines)
    key = [("win", "the winner"), ("base", "full fine-tuning")]
    key += [("other", "interval excludes 0"), ("open", "interval includes 0, or none")] if compared else []
    table = by_seed_table(ranked, split, compared)
    caption = f"{what[0].upper()}{what[1:]}, {SPLIT_NAMES[split]}, in order of rank."
    return Figure(caption, (chart,), table, tuple(key))


def by_seed_table(ranked: Sequence[Standing], split: str, compared: bool) -> Table:
    """Scores of each seed, with differences if available."""
    seeds = sorted({seed for standing in ranked for seed in standing.spreads[split].by_seed})
    headers = ["strategy", *(f"seed {seed}" for seed in seeds)]
    headers += [f"difference, seed {seed}" for seed in seeds] if compared else []
    rows = []
    for standing in ranked:
        own, difference = standing.spreads[split].by_seed, standing.differences.get(split)
        cells = [score(own.get(seed)) for seed in seeds]
        if compared:
            values = difference.by_seed if difference else {}
            cells += [signed(values[seed]) if seed in values else NONE for seed in seeds]
        rows.append((standing.name, *cells))
    return Table(f"Scores by seed, {SPLIT_NAMES[split]}", tuple(headers), tuple(rows), folded=True)


def cost(results: Results, standings: Sequence[Standing]) -> Section:
    """Score against compute time, and all other costs."""
    split = main_split(standings)
    front = front_of(results, standings, split)
    lead = (
        "The cost of a strategy once its options are known: one training run and its measurements on the data before "
        "it (a search, statistics), without evaluations. Compute seconds are processor time over all cores, or "
        "wall-clock time on a GPU. A strategy is on the Pareto front if no other is at least as good and as fast, and "
        "better in one of the two."
    )
    texts = [Text(lead)] + ([Text(f"On the Pareto front, fastest first: {names(front)}.")] if front else [])
    figure = time_figure(results, standings, split, front)
    title = f"{metric_name(results.metric).capitalize()} against time"
    return Section("cost", title, (*texts, *([figure] if figure else []), cost_table(standings, front)))


def time_figure(results: Results, standings: Sequence[Standing], split: str, front: Sequence[str]) -> Figure | None:
    """One point for each contender that finished, labelled with its rank."""
    best, metric = winner(results, standings), metric_name(results.metric)
    shown = [s for s in standings if s.rank and s.compute is not None and s.compute > 0 and split in s.spreads]
    if len(shown) < 2:
        return None
    points = {s.name: (s.compute or 0.0, s.spreads[split].mean) for s in shown}
    x = log_axis([x for x, _ in points.values()], "compute seconds")
    y = linear_axis([y for _, y in points.values()], f"{split} {metric}")
    series = [Series("front", tuple(points[name] for name in front if name in points), joined=True, marked=False)]
    for standing in reversed(shown):  # draw the best ones on top
        kind = kind_of(standing, best)
        kind = "front" if kind == "other" and standing.name in front else kind
        name = "" if kind == "other" else standing.name  # naming all the others could clutter the chart
        series.append(Series(kind, (points[standing.name],), labels=(f"{standing.rank} {name}".strip(),)))
    about = "; ".join(f"{name}: {score(y)} in {duration(x)}" for name, (x, y) in points.items())
    chart = Plot(f"{split} {metric} against compute seconds", about, tuple(series), x, y)
    key = (("win", "the winner"), ("base", "full fine-tuning"), ("front", "on the Pareto front"), ("other", "others"))
    rows = tuple(
        (s.name, str(s.rank), seconds(s.compute), score(s.spreads[split].mean), "yes" if s.name in front else "no")
        for s in shown
    )
    table = Table(
        "Score and compute seconds", ("strategy", "rank", "seconds", split, "on the front"), rows, folded=True
    )
    legend = ", ".join(f"{s.rank} {s.name}" for s in shown)
    return Figure(f"The line is the Pareto front. Numbers are ranks: {legend}.", (chart,), table, key)


def cost_table(standings: Sequence[Standing], front: Sequence[str]) -> Table:
    """The cost of each contender."""
    costs = ("compute seconds", "of which measuring", "wall-clock seconds", "tuning")
    sizes = ("trained weights", "peak memory, MB", "checkpoint, MB")
    headers = ("strategy", *costs, *sizes, "on the front")
    rows = []
    for standing in standings:
        contender = standing.contender
        if not contender.trials and not contender.runs:
            continue
        rows.append(
            (
                standing.name,
                seconds(standing.compute),
                seconds(contender.measure_seconds),
                seconds(standing.seconds),
                seconds(contender.tuning_seconds),
                NONE if standing.parameters_trained is None else f"{standing.parameters_trained:,}",
                NONE if standing.peak_memory_mb is None else f"{standing.peak_memory_mb:,.0f}",
                NONE if standing.checkpoint_mb is None else f"{standing.checkpoint_mb:,.1f}",
                "yes" if standing.name in front else "no",
            )
        )
    return Table("Cost of each strategy: one training run, all tuning, and sizes", headers, tuple(rows))


def out_of_distribution(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Out-of-distribution scores; None if there are none."""
    shown = [standing for standing in standings if "ood" in standing.spreads]
    if not shown:
        return None
    best, metric, rows = winner(results, standings), metric_name(results.metric), []
    for standing in shown:
        test, other, difference = (
            standing.spreads.get("test"),
            standing.spreads["ood"],
            standing.differences.get("ood"),
        )
        drop = NONE if test is None else signed(other.mean - test.mean)
        compared = (signed(difference.mean), interval(difference)) if difference else (NONE, NONE)
        if standing.name == BASELINE:
            compared = ("baseline", NONE)
        rows.append((_named(standing, best), spread(test), spread(other), drop, *compared))
    headers = ("strategy", "test", "out of distribution", "change", "difference from full", "95 % interval")
    figure = difference_figure(results, standings, "ood")
    lead = f"The same models on out-of-distribution data ({metric}), which was not used to select anything."
    table = Table("Scores out of distribution", headers, tuple(rows), frozenset())
    return Section("ood", "Out of distribution", (Text(lead), table, *([figure] if figure else [])))
