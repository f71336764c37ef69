"""The average of training runs, and what went into it."""

from __future__ import annotations

from hf_ft.comparison.report.text import SPLIT_NAMES
from hf_ft.comparison.results import Ingredient, Results, SoupSummary
from hf_ft.documents.document import Section, Table, Text
from hf_ft.documents.text import NONE, code, metric_name, score

SOUP_FOLDER = "soup"  # inside the report's folder


def soup(results: Results) -> Section | None:
    """Scores of the soup, alongside the run that is saved as the winner; None if there is no soup."""
    made = results.soup
    if made is None:
        return None
    lead = (
        f"{sentence(results)} It is saved in {code(SOUP_FOLDER)}, next to this report, and was scored on the test sets "
        "once. Models that were chosen on the same validation data all have optimistic validation scores; compare "
        "them on test, and note that this is one model, not a mean over seeds."
    )
    return Section(
        "soup", f"The average of the {_what(made)}", (Text(lead), _scores(results, made), _ingredients(made))
    )


def sentence(results: Results) -> str:
    """The soup in a sentence, for the report, the terminal and model cards."""
    made, metric = results.soup, metric_name(results.metric)
    if made is None:
        return ""
    members, usable = len(made.members), sum(not one.reason for one in made.ingredients)
    how = "chosen greedily on validation" if made.kind == "greedy" else "all that are alike"
    scored = [
        f"{SPLIT_NAMES[split]} {metric} {score(made.scores[split][results.metric])}"
        for split in SPLIT_NAMES
        if split in made.scores
    ]
    return (
        f"The weights of {members} of {usable} {_what(made)} ({how}) averaged into one model, which costs one forward "
        f"pass: {', '.join(scored)}."
    )


def _what(made: SoupSummary) -> str:
    return "final runs" if all(one.trial is None for one in made.ingredients) else "trials and final runs"


def _scores(results: Results, made: SoupSummary) -> Table:
    splits = [split for split in SPLIT_NAMES if split in made.scores]
    rows = [(f"soup ({made.kind})", str(len(made.members)), *(score(made.scores[s][results.metric]) for s in splits))]
    runs = next((c.finished_runs for c in results.contenders if c.name == results.winner), ())
    saved = next((run for run in runs if run.seed == results.winner_seed), None)
    if saved is not None:
        own = (score(saved.scores.get(split, {}).get(results.metric)) for split in splits)
        rows.append((f"the winner's saved run: {results.winner}, seed {saved.seed}", "1", *own))
    headers = ("model", "members", *(SPLIT_NAMES[split] for split in splits))
    return Table(f"{metric_name(results.metric).capitalize()} of the average and of a single run", headers, tuple(rows))


def _ingredients(made: SoupSummary) -> Table:
    strong = frozenset(index for index, one in enumerate(made.ingredients) if one.member)
    rows = tuple(
        (one.contender, one.number, score(one.validation), score(one.with_it), _fate(one)) for one in made.ingredients
    )
    headers = ("strategy", "training", "validation", "of the average with it", "in the average")
    return Table(f"{_what(made).capitalize()}, and which of them are averaged", headers, rows, strong, folded=True)


def _fate(one: Ingredient) -> str:
    return (
        "yes" if one.member else f"left out: {one.reason}" if one.reason else "no" if one.with_it is not None else NONE
    )
