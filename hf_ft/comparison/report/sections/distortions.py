"""Feature distortion of each strategy by block, in and out of distribution."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import cast

from hf_ft.comparison.report.text import SPLIT_NAMES
from hf_ft.comparison.results import Training
from hf_ft.comparison.statistics import Standing
from hf_ft.documents.chart import Axis, Plot, Series, linear_axis
from hf_ft.documents.document import Figure, Section, Table, Text
from hf_ft.documents.text import score

MEASURES = {"relative_l2": "distance", "cosine": "cosine"}
DEPTHS = {"first block": 0.0, "at 1/4": 0.25, "at 1/2": 0.5, "at 3/4": 0.75, "last block": 1.0}  # columns of the table
INTO_HEAD = "features"  # name of the head's input, listed with the blocks
MOST_MARKS = 12  # per line; with more points only the line is drawn
KINDS = ("other", "second", "front", "open")  # by split

Measures = Mapping[str, float]
Blocks = Mapping[str, Measures]


def distortion(standings: Sequence[Standing]) -> Section | None:
    """Charts and tables; None if no distortion was measured."""
    measured = {standing.name: mean_distortion(standing.contender.finished_runs) for standing in standings}
    measured = {name: splits for name, splits in measured.items() if splits}
    if not measured:
        return None
    values = [far["relative_l2"] for splits in measured.values() for of in splits.values() for far in of.values()]
    x = Axis(-0.03, 1.03, ((0.0, "first"), (1.0, "head")), "depth")
    y = linear_axis(values, "relative L2 distance", most=4, include=[0.0])
    splits = list(dict.fromkeys(split for of_one in measured.values() for split in of_one))
    kinds = dict(zip(splits, KINDS, strict=False))
    charts = tuple(_chart(name, of_one, kinds, x, y) for name, of_one in measured.items())
    lead = (
        "The distance between the features before and after training, relative to those before, averaged over samples "
        "and seeds: 0 means unchanged. In an ensemble, each model has its own line. Kumar et al. (2022) relate large "
        "distances to worse scores out of distribution."
    )
    caption = "Relative L2 distance, from the first block to the head's input. All charts have the same axes."
    key = tuple((kind, in_words(split) + (", dashed" if kind == "second" else "")) for split, kind in kinds.items())
    figure = Figure(caption, charts, distortion_table(measured), key)
    return Section("distortion", "Feature distortion", (Text(lead), figure))


def mean_distortion(runs: Sequence[Training]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over runs, by split, block and measure."""
    values_by_split: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        for split, blocks in run.distortion.items():
            for block, measures in blocks.items():
                for measure, value in cast(Measures, measures).items():
                    values_by_split.setdefault(split, {}).setdefault(block, {}).setdefault(measure, []).append(value)
    return {
        split: {block: {name: statistics.fmean(values) for name, values in m.items()} for block, m in blocks.items()}
        for split, blocks in values_by_split.items()
    }


def in_words(split: str) -> str:
    return {"ood": "out of distribution", "test": "in distribution (test)"}.get(split, SPLIT_NAMES.get(split, split))


def by_model(blocks: Blocks) -> dict[str, list[Measures]]:
    """The blocks of each model in order; with several models, blocks are named like ``member0_block3``."""
    models: dict[str, list[Measures]] = {}
    for name, measures in blocks.items():
        if name != INTO_HEAD:
            models.setdefault(name.rpartition("_")[0], []).append(measures)
    return models


def _chart(name: str, splits: Mapping[str, Blocks], kinds: Mapping[str, str], x: Axis, y: Axis) -> Plot:
    series, about = [], []
    for split, blocks in splits.items():
        head = [blocks[INTO_HEAD]] if INTO_HEAD in blocks else []
        for model, own in by_model(blocks).items():
            far = [measures["relative_l2"] for measures in (*own, *head)]
            points = tuple((i / max(1, len(far) - 1), value) for i, value in enumerate(far))
            series.append(Series(kinds[split], points, joined=True, marked=len(points) <= MOST_MARKS))
            whose = f"{in_words(split)}, {model}" if model else in_words(split)
            about.append(f"{whose}: {score(far[0])} at the first block, {score(far[-1])} at the end")
    return Plot(name, "; ".join(about), tuple(series), x, y, small=True)


def distortion_table(measured: Mapping[str, Mapping[str, Blocks]]) -> Table:
    """Both measures at selected depths; a table of all blocks would be too long."""
    rows = []
    for name, splits in measured.items():
        for split, blocks in splits.items():
            for model, own in by_model(blocks).items():
                for key, measure in MEASURES.items():
                    cells = [score(own[round(depth * (len(own) - 1))].get(key)) for depth in DEPTHS.values()]
                    whose = f"{name}, {model}" if model else name
                    rows.append((whose, in_words(split), measure, *cells, score(blocks.get(INTO_HEAD, {}).get(key))))
    caption = "Relative L2 distance and cosine similarity at selected depths; results.json has all blocks"
    return Table(caption, ("strategy", "data", "measure", *DEPTHS, "head input"), tuple(rows), folded=True)
