"""Findings of a choice, for display."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from hf_ft.core.findings import Figure, Findings, Table, Text
from hf_ft.documents.chart import Row, Rows, linear_axis
from hf_ft.strategies.auto.result import Choice, Tried

HEADERS = ("strategy", "held-out log loss", "accuracy", "folds", "learning rate", "expected gain", "cost", "note")
FOLDS = ("", "one fold", "two folds", "three folds", "four folds", "five folds")


def reasons(choice: Choice) -> str:
    """Why a strategy was chosen, in a sentence or two."""
    cost = (
        f"Choosing cost {choice.searching:.2f} full fine-tunings, and training costs {choice.finishing:.2f}, of the "
        f"{choice.budget:g} allowed."
    )
    rate = "" if choice.rate is None else f" at learning rate {choice.rate:g}"
    if not choice.tried:
        return (
            f"`{choice.chosen}`{rate} was chosen from earlier comparisons: the budget of {choice.budget:g} full "
            f"fine-tunings leaves no room to compare. {cost}"
        )
    best, *others = choice.ranking
    said = [one for one in others if len(one.losses) == len(best.losses) and one.strategy != choice.chosen]
    dropped = [f"`{one.strategy}`" for one in others if len(one.losses) < len(best.losses)]
    after = f"after {choice.epochs} epoch{'s' * (choice.epochs > 1)}"
    if best.strategy == choice.chosen:
        text = (
            f"`{choice.chosen}`{rate} was chosen: {after} it has the lowest log loss on held-out training samples, "
            f"{best.mean():.3f} on {_folds(len(best.losses))}"
        )
        text += f", ahead of {', '.join(map(_mean, said))}" if said else ""
    else:
        (chosen,) = (one for one in others if one.strategy == choice.chosen)
        text = (
            f"`{choice.chosen}`{rate} was chosen: earlier comparisons expect most of it, and {after} its log loss on "
            f"held-out training samples, {chosen.mean():.3f} on {_folds(len(best.losses))}, is above the lowest, "
            f"{_mean(best)}, by less than the standard error of the difference, {best.error:.3f}"
        )
        text += f"; others: {', '.join(map(_mean, said))}" if said else ""
    text += f"; dropped earlier: {', '.join(dropped)}" if dropped else ""
    return f"{text}. {cost}"


def _mean(one: Tried) -> str:
    return f"`{one.strategy}` {one.mean():.3f}"


def describe_average(record: Mapping[str, Any] | None) -> str:
    """The result of choosing averaged weights after training; empty before that, and if there was no choice."""
    if record is None or len(record["scores"]) < 2:
        return ""
    scores = ", ".join(f"{value:g}: {'not finite' if s is None else f'{s:.3f}'}" for value, s in record["scores"])
    share = record["value"]
    kept = "as trained" if share == 1 else f"{share:g} of the trained and {1 - share:.2g} of the pretrained ones"
    return f"The final weights are {kept}, chosen by {record['metric']} on validation data ({scores})."


def choice_findings(choice: Choice, summary: str, chosen: Findings) -> Findings:
    """The table of what was tried, a chart, ``auto.json``, and what the chosen strategy found."""
    table = Table("Strategies trained briefly", HEADERS, tuple(_row(choice, one) for one in choice.ranking))
    own = (choice_figure(choice, table),) if choice.tried else ()
    short = (*((table,) if choice.tried else ()), Text(summary), _left_out(choice.declined))
    return Findings(
        summary,
        blocks=(*own, *chosen.blocks),
        short=(*short, *chosen.short),
        files={"auto.json": choice.to_dict(), **chosen.files},
        plots=chosen.plots,
    )


def choice_figure(choice: Choice, table: Table) -> Figure:
    """A bar for each strategy that was trained briefly, best first."""
    rows = tuple(_bar(choice, one) for one in choice.ranking)
    axis = linear_axis([row.value for row in rows if row.value is not None] or [0.0], "log loss", include=[0.0])
    about = "; ".join(f"{row.label} {row.text}" for row in rows)
    chart = Rows("Held-out log loss after a brief training run", about, rows, axis, (), bars=True)
    caption = f"Log loss on held-out samples, at the best temperature, after {choice.epochs} epochs; lower is better."
    key = [("win", "chosen"), ("other", "others")]
    if any(len(one.losses) < len(choice.ranking[0].losses) for one in choice.tried):
        key.append(("pruned", "dropped before the last fold"))
    return Figure(caption, (chart,), Table(table.caption, table.headers, table.rows, folded=True), tuple(key))


def _bar(choice: Choice, one: Tried) -> Row:
    if not math.isfinite(one.mean()):
        return Row(one.strategy, None, "diverged")
    kind = "win" if one.strategy == choice.chosen else "other"
    kind = "pruned" if len(one.losses) < len(choice.ranking[0].losses) else kind
    note = {"win": " chosen", "pruned": " dropped"}.get(kind, "")
    return Row(one.strategy, one.mean(), f"{one.mean():.3f}{note}", None, kind)


def _left_out(declined: Mapping[str, str]) -> Table:
    """What was not tried: a row for each reason."""
    sharing: dict[str, list[str]] = {}
    for name, why in declined.items():
        sharing.setdefault(why, []).append(name)
    rows = (
        (names[0], why) if len(names) == 1 else (f"{len(names)} strategies", f"{why}: {', '.join(names)}")
        for why, names in sharing.items()
    )
    return Table("Not tried", (), tuple(rows))


def _row(choice: Choice, one: Tried) -> tuple[str, ...]:
    accuracy = f"{statistics.fmean(one.accuracies):.3f}" if one.accuracies else "-"
    loss = f"{one.mean():.3f}" if math.isfinite(one.mean()) else "diverged"
    rate = "as set, or fitted" if one.rate is None else f"{one.rate:g}"
    note = "chosen" if one.strategy == choice.chosen else ""
    folds, gain = str(len(one.losses)), f"{100 * one.expected:+.1f} points"
    return one.strategy, loss, accuracy, folds, rate, gain, f"{one.cost:.2f}", note


def _folds(count: int) -> str:
    return FOLDS[count] if count < len(FOLDS) else f"{count} folds"
