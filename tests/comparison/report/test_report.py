"""The report: its structure, also for screen readers, its sentences, and that results are never read as markup."""

import dataclasses
import functools
import importlib.resources
import json
import os
import re
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hf_ft import FTConfig, FullConfig, PEFTConfig, SpotTuneConfig, option, register
from hf_ft.comparison.report import write, write_report
from hf_ft.comparison.report.build import document
from hf_ft.comparison.report.card import card_section
from hf_ft.comparison.report.sections.calibration import by_chance, calibration
from hf_ft.comparison.report.sections.distortions import distortion
from hf_ft.comparison.report.sections.findings import findings
from hf_ft.comparison.report.sections.learning import tuning
from hf_ft.comparison.report.sections.ranking import usage
from hf_ft.comparison.report.sections.verdict import cautions, largest_standard_error, verdict
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import standings
from hf_ft.core.config import _CONFIGS
from hf_ft.core.findings import Findings, Table
from hf_ft.documents.chart import Axis, Plot, Row, Rows, Series, linear_axis, log_axis
from hf_ft.documents.document import Figure, Text
from hf_ft.documents.html import html
from hf_ft.documents.label_places import NARROW, WIDE, placed
from hf_ft.documents.markdown import escaped, markdown
from hf_ft.documents.svg import key_mark, svg
from hf_ft.documents.text import duration, plain, score, seconds, signed
from hf_ft.errors import CheckpointError
from hf_ft.inference.calibration import expected_calibration_error, reliability
from hf_ft.processes import process_name
from tests.comparison.report import made_up_results

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements with their ancestors, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.feed(text)
        assert not self.open, f"not closed: {[element[0] for element in self.open]}"

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), tuple(parent[0] for parent in self.open), len(self.elements))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            self.text[element[3]] = self.text.get(element[3], "") + data

    def all(self, *tags):
        return [element for element in self.elements if element[0] in tags]

    def text_of(self, element):
        return " ".join(self.text.get(element[3], "").split())


CONTENTS = {
    "whole": made_up_results.comparison,
    "hostile": lambda: made_up_results.comparison(hostile=True),
    "one seed": lambda: made_up_results.comparison(seeds=1),
    "smallest": made_up_results.smallest,
    "many classes": made_up_results.many_classes,
    "nothing finished": lambda: (
        made_up_results.comparison() | {"contenders": unfinished(), "winner": "", "winner_seed": None}
    ),
}


def unfinished():
    return [
        c for c in made_up_results.comparison()["contenders"] if c["status"] in ("cannot run", "failed", "not reached")
    ]


@dataclasses.dataclass(frozen=True)
class Made:
    results: Results
    html: str
    page: Page
    markdown: str


@functools.cache
def made(name):
    """Everything about one report, made once."""
    results = Results.from_dict(json.loads(json.dumps(CONTENTS[name]())))
    content = document(results)
    text = html(content)
    return Made(results, text, Page(text), markdown(content))


@pytest.fixture(params=CONTENTS)
def made_report(request):
    return made(request.param)


@pytest.fixture
def page(made_report):
    return made_report.page


@pytest.fixture
def whole():
    return made("whole").results


# --- the page --------------------------------------------------------------------------------------------


def test_language_title_viewport_and_landmarks(page):
    assert page.all("html")[0][1]["lang"] == "en"
    assert page.text_of(page.all("title")[0])
    assert any(meta[1].get("name") == "viewport" for meta in page.all("meta"))
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    first = next(element for element in page.elements if element[0] == "a")
    assert first[1]["class"] == "skip" and first[1]["href"] == "#main" and page.all("main")[0][1]["id"] == "main"


def test_headings_go_down_by_one_level(page):
    levels = [int(element[0][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(page.text_of(element) for element in page.all("h1", "h2", "h3"))


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = [element[1]["id"] for element in page.elements if "id" in element[1]]
    assert len(ids) == len(set(ids))
    for _, attributes, _, _ in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_nothing_is_loaded_from_elsewhere(page, made_report):
    for tag, attributes, _, _ in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "image", "use")
        assert not any(name.startswith("on") for name in attributes)
        assert not {"srcset", "xlink:href"} & set(attributes)
        assert ("src" in attributes) == (tag == "img") and attributes.get("src", "data:image/").startswith(
            "data:image/"
        )
        address = attributes.get("href", "#")
        assert address.startswith(("#", "data:,")) or (tag == "a" and address.startswith("https://"))
    assert "@import" not in made_report.html and "url(" not in made_report.html
    policy = next(m[1]["content"] for m in page.all("meta") if m[1].get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_every_drawing_is_named_or_hidden(page):
    outer = [element for element in page.all("svg") if "svg" not in element[2]]
    for element in outer:
        if element[1].get("aria-hidden") == "true":
            continue
        assert element[1]["role"] == "img"
        named = element[1]["aria-labelledby"].split()
        texts = {e[1]["id"]: page.text_of(e) for e in page.all("title", "desc") if "id" in e[1]}
        assert len(named) == 2 and all(texts[name] for name in named)
    assert all("figure" in element[2] for element in outer)


def test_tables_have_captions_and_scopes(page):
    tables = page.all("table")
    assert tables and len(page.all("caption")) == len(tables)
    assert all(page.text_of(caption) for caption in page.all("caption"))
    assert {header[1].get("scope") for header in page.all("th")} <= {"row", "col"}
    for region in (e for e in page.elements if e[1].get("class", "").startswith("scroll")):
        assert region[1]["role"] == "region" and region[1]["tabindex"] == "0" and region[1]["aria-labelledby"]


def test_every_figure_has_its_numbers_in_a_table(page):
    figures = page.all("figure")
    assert len([e for e in page.all("table") if "figure" in e[2] and "details" in e[2]]) == len(figures)
    assert len(page.all("figcaption")) == len(figures)


def test_the_whole_report_has_all_its_sections(whole):
    page = made("whole").page
    names = [element[1]["id"] for element in page.all("section")]
    assert names == [
        "result",
        "ranking",
        "cost",
        "ood",
        "errors",
        "calibration",
        "curves",
        "tuning",
        "findings",
        "distortion",
        "data",
        "problems",
        "advice",
        "about",
    ]
    text = " ".join(page.text_of(page.all("main")[0]).split())
    for standing in standings(whole):
        assert standing.name in text
    assert whole.command in text and "out of memory" in text and "source data are needed" in text
    assert 'model="best"' in text and "CC-BY-NC-SA-4.0" in text and "2 rows of train" in text
    assert "nearly equal to train" in text and "train 7 (cells/7.png): " in text and "2 of 30 sets" in text


def test_findings_of_strategies_from_elsewhere_do_no_harm():
    """They may have the same names as ours with a different meaning."""
    content = made_up_results.comparison()
    foreign = ({"scores": 3}, {"swarm": {}}, {"history": [], "figures": []})
    for contender, found in zip(content["contenders"], foreign, strict=False):
        contender["found"] = found
    content["contenders"][3] |= {"found": {"own": 1}, "learned": "It learned *this*."}
    results = Results.from_dict(content)
    texts = [block.text for block in findings(standings(results)).blocks if isinstance(block, Text)]
    assert "It learned *this*." in texts and "It learned \\*this\\*." in markdown(document(results))
    Page(html(document(results)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElsewhereConfig(FTConfig):
    """From elsewhere."""

    unit: str = option("votes", "Of its scores.")

    def findings(self, state):
        rows = tuple((name, str(value)) for name, value in state.info["scores"].items())
        marks = tuple(Row(name, value) for name, value in state.info["scores"].items())
        chart = Rows("Votes by name", "", marks, linear_axis([0.0, 9.0], self.unit), bars=True)
        return Findings(blocks=(Figure("What it counted.", (chart,), Table("Its counts", ("name", self.unit), rows)),))


@pytest.fixture
def elsewhere():
    """Results of a strategy from outside this package, registered only while they are made."""
    content = made_up_results.comparison()
    config = {"ft_type": "elsewhere", "unit": "voices"}
    content["contenders"][3] |= {"configs": [config], "found": {"scores": {"low": 2, "high": 7}}, "learned": "High."}
    register("elsewhere")(ElsewhereConfig)
    yield content
    _CONFIGS.pop("elsewhere", None)


def test_a_strategy_from_elsewhere_shows_its_table_and_chart(elsewhere):
    results = Results.from_dict(json.loads(json.dumps(elsewhere)))
    text, page = markdown(document(results)), html(document(results))
    assert "High.\n\nWhat it counted." in text and "| name | voices |\n| --- | --- |\n| low | 2 |" in text
    Page(page)
    assert "Its counts" in page and "Votes by name" in page


def test_a_strategy_that_is_not_registered_shows_its_text(elsewhere):
    del _CONFIGS["elsewhere"]
    text = markdown(document(Results.from_dict(elsewhere)))
    assert "High." in text and "What it counted." not in text


def test_findings_that_cannot_be_shown_are_reported_and_do_not_affect_others(elsewhere, caplog):
    elsewhere["contenders"][3]["found"] = {"counts": {}}
    with caplog.at_level("WARNING", "hf_ft"):
        text = markdown(document(Results.from_dict(elsewhere)))
    assert "its findings cannot be shown (KeyError: 'scores')" in caplog.text
    assert "High." in text and "Scores of the block search" in text


def test_charts_of_findings_hold_their_figures(whole):
    charts = [c for block in findings(standings(whole)).blocks if isinstance(block, Figure) for c in block.charts]
    blocks = next(chart for chart in charts if chart.title.startswith("Score by block"))
    assert [row.label for row in blocks.rows] == ["stem", "stage0", "stage1", "stage2", "stage3", "stage4"]
    assert blocks.rows[4].kind == "win" and blocks.rows[4].value == pytest.approx(0.823)
    assert blocks.rows[1].kind == "pruned" and blocks.lines == ((pytest.approx(0.755), "head only"),)
    shares = next(chart for chart in charts if chart.title.startswith("Shares of the features F in the relevant part"))
    assert [row.value for row in shares.rows] == [0.61, 0.74, 0.07, 0.21, 0.01, 0.0]
    swarm = next(chart for chart in charts if chart.title == "mobilenet_v2")
    evaluations = {c.name: c for c in whole.contenders}["amcf"].found["swarm"]["evaluations"]
    assert sum(len(series.points) for series in swarm.series) == len(evaluations)


def test_features_of_several_models_have_a_line_each():
    blocks = {f"member{m}_block{b}": {"relative_l2": m + b / 10, "cosine": 1.0} for m in (0, 1) for b in range(3)}
    blocks["features"] = {"relative_l2": 5.0, "cosine": 0.5}
    content = made_up_results.smallest()
    content["contenders"][0]["runs"][0]["distortion"] = {"ood": blocks}
    section = distortion(standings(Results.from_dict(content)))
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    lines = [[y for _, y in series.points] for series in figure.charts[0].series]
    assert lines == [[0.0, 0.1, 0.2, 5.0], [1.0, 1.1, 1.2, 5.0]]
    assert [x for x, _ in figure.charts[0].series[0].points] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    cells = ("full, member1", "out of distribution", "distance", "1.000", "1.000", "1.100", "1.200", "1.200", "5.000")
    assert cells in figure.table.rows


def test_a_best_trial_that_was_not_confirmed():
    """The final runs then use the defaults, and the table says what the best trial scored when it was repeated."""
    content = made_up_results.comparison()
    daft = next(contender for contender in content["contenders"] if contender["name"] == "daft")
    daft["rejected"] = [run | {"validation": value} for run, value in zip(daft["runs"], (0.7, 0.71), strict=False)]

    def remarks():
        results = Results.from_dict(content)
        section = tuning(results, standings(results))
        table = next(block for block in section.blocks if getattr(block, "headers", ())[-1:] == ("remarks",))
        return next(row for row in table.rows if row[0] == "daft")[-1]

    daft["chosen"] = 1
    assert "trained again" not in remarks()
    daft["chosen"] = 0
    assert "trained again, the best trial scored 0.705 only: these are the defaults" in remarks()


def test_a_failed_trial_is_drawn_at_the_worst_end_and_a_score_of_zero_at_its_place():
    content = made_up_results.smallest()
    full = content["contenders"][0]
    trials = [full["trials"][0] | {"validation": value} for value in (0.412, 0.0, None)]
    full["trials"] = [trial | {"params": {"learning_rate": 10.0**-i}} for i, trial in enumerate(trials)]
    results = Results.from_dict(content)
    section = tuning(results, standings(results))
    chart = next(block for block in section.blocks if isinstance(block, Figure)).charts[0]
    points = {series.kind: series.points for series in chart.series}
    assert points == {"win": ((1.0, 0.412),), "open": ((0.1, 0.0),), "failed": ((0.01, chart.y.high),)}


def test_hostile_text_is_only_text():
    hostile = made("hostile")
    text, page, written = hostile.html, hostile.page, hostile.markdown
    assert not page.all("script") and "<script" not in text and text.count("</style>") == 1
    assert page.text_of(page.all("h1")[0]) == made_up_results.HOSTILE
    assert "<script" not in written and "</style>" not in written
    assert "<script" not in card_section(hostile.results)


def test_many_classes_are_listed_by_their_confusions():
    page = made("many classes").page
    captions = [page.text_of(caption) for caption in page.all("caption")]
    assert "Most frequent errors on test" in captions and "Confusion matrix on test" not in captions
    assert "predicted class 7" not in " ".join(page.text_of(header) for header in page.all("th"))
    few = made("whole").page
    assert "Confusion matrix on test" in [few.text_of(caption) for caption in few.all("caption")]
    headers = [few.text_of(header) for header in few.all("th")]
    assert "true class" in headers and "predicted defective" in headers


def test_calibration_is_shown_for_each_strategy(whole):
    """Means over runs, and bins of all runs together; nothing for results of version 0.1.0, which lack it."""
    section = calibration(whole, standings(whole))
    table = next(block for block in section.blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == [s.name for s in standings(whole) if s.contender.finished_runs]
    runs = whole["daft"].runs
    cells = next(row for row in table.rows if row[0] == "daft")
    losses = zip(*(run.calibration["test"].log_loss for run in runs), strict=True)
    for cell, values in zip(cells[1:3], losses, strict=True):
        assert cell.startswith(f"{sum(values) / 3:.3f}\u00a0±")
    assert cells[5] == "2.200\u00a0±\u00a00.100"
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert len(figure.charts) == len(table.rows) and all(len(chart.series) == 3 for chart in figure.charts)
    bins = [one for run in runs for one in run.calibration["test"].bins if one.confidence > 14 / 15]
    right, samples = sum(one.samples * one.accuracy for one in bins), sum(one.samples for one in bins)
    row = next(row for row in figure.table.rows if row[0] == "daft, as trained")
    assert figure.table.headers[-1] == "to 1.00" and row[-1] == f"{right / samples:.2f} ({samples:,})"
    older = whole.to_dict()
    for run in (run for contender in older["contenders"] for run in contender["runs"]):
        del run["calibration"], run["temperature"], run["logits"]
    again = Results.from_dict(older)
    assert calibration(again, standings(again)) is None and "Calibration" not in card_section(again)


def test_the_error_by_chance_is_that_of_exact_probabilities():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1.0, 400)
    errors = [expected_calibration_error(confidence, random.random(400) < confidence) for _ in range(300)]
    bins = reliability(confidence, random.random(400) < confidence)
    assert by_chance(bins) == pytest.approx(np.mean(errors), rel=0.05)


def test_mistakes_have_thumbnails_only_if_they_are_in_the_results(whole):
    page = made("whole").page
    assert len(page.all("img")) == 1 and "th" in page.all("img")[0][2] and page.all("img")[0][1]["alt"] == ""
    text = page.text_of(next(element for element in page.all("section") if element[1]["id"] == "errors"))
    assert "Of 100 mistakes on test" in text and "defective/cell0001.png defective functional 0.980" in text
    assert "in_it_0002.png | defective" in made("whole").markdown and "base64" not in made("whole").markdown
    content = whole.to_dict()
    content["mistakes"]["surest"][0]["shown"] = "https://example.org/x.png"
    assert html(document(Results.from_dict(content))).count("<img") == 1
    content["mistakes"]["surest"][0]["true"] = 2
    with pytest.raises(CheckpointError, match="mistakes lie outside the 2 classes"):
        Results.from_dict(content)


def test_it_is_the_same_each_time(whole):
    content = document(whole)
    assert html(content) == made("whole").html and markdown(content) == made("whole").markdown


# --- sentences -------------------------------------------------------------------------------------------


def said(content):
    results = Results.from_dict(content)
    found = standings(results)
    return " ".join(verdict(results, found)), " ".join(cautions(results, found))


def test_verdict_names_the_winner_its_scores_and_the_difference():
    content = made_up_results.comparison()
    first, caution = said(content)
    winner = content["winner"]
    assert first.startswith(f"`{winner}` has the highest mean validation balanced accuracy of 14 strategies")
    assert "On test, which was not used for selection" in first and "95 % interval [" in first
    assert "The intervals cover chance in training (3 seeds) and which rows are in the test set" in caution
    assert "Of 13 strategies equivalent to full fine-tuning, about 0.7 would be told apart from it by chance" in caution
    assert "The test set has 600 rows" in caution
    excluded = " ".join(re.findall(r"excludes 0: (.*?)\.", caution))
    held = re.search(r"includes 0\): (.*?)\.", caution)[1]
    for standing in standings(Results.from_dict(content)):
        if standing.rank and standing.name != "full":
            better = standing.differences["test"].excludes_zero
            assert f"`{standing.name}`" in (excluded if better else held)


def test_verdict_reports_where_validation_was_wrong():
    content = made_up_results.comparison()
    for contender in content["contenders"]:
        for run in contender["runs"]:
            shift = 0.5 if contender["name"] == content["winner"] else 0.0
            run["scores"]["test"]["balanced_accuracy"] -= shift
    first, caution = said(content)
    assert "On test, full fine-tuning is better" in first
    assert f"Worse than full fine-tuning on test, with an interval that excludes 0: `{content['winner']}`" in caution


def test_a_small_validation_set_is_reported_with_its_largest_error():
    content = made_up_results.comparison()
    results = Results.from_dict(content)
    counts = content["data"]["class_counts"]["validation"]
    by_hand = (0.25 / counts[0] + 0.25 / counts[1]) ** 0.5 / 2  # both recalls 1/2
    assert largest_standard_error(results, "validation") == pytest.approx(by_hand)
    accuracy = dataclasses.replace(results, metric="accuracy")
    assert largest_standard_error(accuracy, "validation") == pytest.approx(0.5 / 150**0.5)
    assert largest_standard_error(dataclasses.replace(results, metric="mse"), "validation") is None
    means = [standing.spreads["validation"].mean for standing in standings(results) if standing.rank]
    near = sum(means[0] - mean <= by_hand for mean in means[1:])
    assert f"has 150 rows: one standard error of a score is up to {by_hand:.3f}" in said(content)[1]
    assert f"and {near} of the other 13 strategies" in said(content)[1] and near > 0


def test_ties_on_validation_are_reported():
    content = made_up_results.comparison()
    best = next(c for c in content["contenders"] if c["name"] == content["winner"])
    other = next(c for c in content["contenders"] if c["name"] == "linear_probe")
    for run, same in zip(other["runs"], best["runs"], strict=True):
        run["validation"] = same["validation"]
        run["curve"] = [{**point, "validation": 2.0} for point in run["curve"]]
    content["winner"] = "linear_probe"  # the one that is better in its later epochs
    caution = said(content)[1]
    assert f"`{best['name']}` has the same mean validation score; the tie was broken by the later half" in caution


def test_one_seed_gives_no_interval_and_says_so():
    first, caution = said(made_up_results.comparison(seeds=1))
    assert "one seed, so no interval" in first and "There is only one seed" in caution
    assert "excludes 0" not in caution


def test_intervals_without_predictions_cover_training_alone():
    content = made_up_results.comparison()
    content["labels"] = {}
    for contender in content["contenders"]:
        for run in contender["runs"]:
            run["predictions"] = {}
    assert "chance in training (3 seeds), not which rows are in the test set" in said(content)[1]


def test_verdicts_without_rivals_baseline_or_test():
    assert said(made_up_results.smallest()) == (
        "Only `full` finished: validation mean squared error 0.412 (one seed).",
        "",
    )
    assert said(CONTENTS["nothing finished"]())[0].startswith("No strategy finished")
    content = made_up_results.comparison()
    content["contenders"] = [c for c in content["contenders"] if c["name"] != "full"]
    assert "differences from it are unknown" in said(content)[1]
    content = made_up_results.comparison()
    for contender in content["contenders"]:
        for run in contender["runs"]:
            del run["scores"]["test"], run["predictions"]["test"]
    first, caution = said(content)
    assert "on validation is" in first and "Without a test split" in caution


def test_numbers_in_words():
    assert [score(v) for v in (0.8346, 0.0, 12.5, 0.00123, 123456.0, None, float("nan"))] == [
        "0.835",
        "0.000",
        "12.500",
        "0.00123",
        "1.23e+05",
        "–",
        "–",
    ]
    assert [signed(v) for v in (0.021, -0.004, 0.0, 0.0004, -12.0)] == [
        "+0.021",
        "−0.004",
        "0.000",
        "+0.000",
        "−12.000",
    ]
    assert [seconds(v) for v in (0, 6.23, 31.4, 1234.5, None)] == ["0", "6.2", "31", "1,234", "–"]
    assert [duration(v) for v in (7384, 200, 60, 3600, 4.2)] == ["2 h 3 min", "3 min 20 s", "1 min", "1 h", "4.2 s"]
    assert plain({"a": 0.0123456, "b": [1, None]}) == "a: 0.01235, b: 1, none"


# --- Markdown --------------------------------------------------------------------------------------------


def test_markdown_tables_are_whole(made_report):
    for written in (made_report.markdown, card_section(made_report.results)):
        cells = 0
        for line in written.splitlines():
            here = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert not (here and cells) or here == cells, line
            cells = here


def test_card_section_is_short_and_complete(whole):
    section = card_section(whole)
    assert section.startswith("## Comparison\n") and len(section) < 4000
    best = standings(whole)[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {best.name} |"))
    assert score(best.spreads["test"].mean) in row and signed(best.differences["test"].mean) in row
    assert whole.command in section and "learning_rate in 1e-05 to 0.3" in section
    assert card_section(Results.from_dict(CONTENTS["nothing finished"]())).startswith("## Comparison\n")


def test_escaping_leaves_names_as_they_are():
    assert escaped("layer_decay lp_ft+l2_sp") == "layer_decay lp_ft+l2_sp"
    assert escaped("_a_ *b* `c`\n| <d> & [e](f) #") == r"\_a\_ \*b\* \`c\` \| &lt;d&gt; &amp; \[e\](f) \#"


# --- files -----------------------------------------------------------------------------------------------


def test_files(whole, tmp_path):
    folder = tmp_path / "new" / "folder"
    write_report(whole, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "results.json"]
    again = Results.load(folder / "results.json")
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())
    assert (folder / "report.html").read_text(encoding="utf-8") == made("whole").html
    assert (folder / "report.md").read_text(encoding="utf-8") == made("whole").markdown


def test_what_killed_processes_left_is_removed_and_nothing_else(whole, tmp_path):
    place, number, started = process_name().split("-")
    gone = f".results.json.{place}-{number}-{int(started) + 1}"
    old, others = ".report.md.4711", [f".results.json.{'0' * 12}-1-2", ".report.html.4711", ".results.json.bak"]
    for name in (gone, old, *others):
        (tmp_path / name).write_text("{")
    os.utime(tmp_path / old, (0, 0))
    os.utime(tmp_path / others[2], (0, 0))
    write_report(whole, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "results.json", *others}


def test_a_report_that_cannot_be_made_leaves_the_old_one(whole, tmp_path, monkeypatch):
    write_report(whole, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = dataclasses.replace(whole, title="another")

    def fail(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(write, "markdown", fail)
    with pytest.raises(RuntimeError):
        write_report(other, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError):
        write_report(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_template_and_style_are_in_the_package():
    package = "hf_ft.documents"
    files = importlib.resources.files(package)
    config = ConfigParser()
    config.read(Path(__file__).parents[3] / "setup.cfg")
    names = config["options.package_data"][package].split(", ")
    assert {"report.html.jinja", "report.css"} <= set(names)
    assert all(files.joinpath(name).is_file() for name in names)


# --- charts ----------------------------------------------------------------------------------------------


def test_linear_axis_has_round_ticks_within():
    axis = linear_axis([0.71, 0.84], "score")
    assert [text for _, text in axis.ticks] == ["0.75", "0.80"]
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks) and len(axis.ticks) >= 2
    assert all(float(text.replace("−", "-")) == pytest.approx(value) for value, text in axis.ticks)
    assert axis.low < 0.71 and axis.high > 0.84
    flat = linear_axis([0.4, 0.4], "score")
    assert flat.low < 0.4 < flat.high
    assert linear_axis([1.0, 3.0], "x", include=[0.0]).low == 0.0
    assert linear_axis([float("nan")], "x").ticks
    assert linear_axis([-0.03, 0.06], "difference", include=[0.0]).share(0.0) == pytest.approx(
        (0.03 + 0.0054) / (0.09 * 1.12)
    )


def test_log_axis_places_by_ratio():
    axis = log_axis([1e-5, 1e-1], "rate", most=3)
    assert axis.share(1e-3) == pytest.approx(0.5)
    assert [text for _, text in axis.ticks] == ["10⁻⁵", "10⁻³", "10⁻¹"]
    assert [text for _, text in log_axis([12.0, 160.0], "seconds").ticks] == ["20", "50", "100"]
    assert log_axis([5.0, 5.0], "seconds").share(5.0) == pytest.approx(0.5)
    assert axis.share(0.0) == 0.0


def test_marks_are_drawn_at_their_values():
    x, y = Axis(0.0, 10.0, (), "x"), Axis(0.0, 1.0, (), "y")
    drawn = svg(Plot("t", "d", (Series("win", ((2.5, 1.0), (10.0, 0.0))),), x, y), "n")
    assert re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)"', drawn) == [("25", "22"), ("100", "322")]
    rows = (Row("a", 5.0, "5", (2.0, 8.0)), Row("b", None, "diverged"), Row("c", float("nan"), "none"))
    drawn = svg(Rows("t", "d", rows, x), "n")
    assert 'x1="20%"' in drawn and 'x2="80%"' in drawn and '<svg x="50%"' in drawn
    assert ">diverged</text>" in drawn and "nan" not in drawn


def test_charts_escape_and_skip_what_is_not_finite():
    x, y = Axis(0.0, 1.0, ((0.0, "<b>"),), "<i>"), Axis(0.0, 1.0, (), "")
    points = ((0.1, float("nan")), (0.2, 0.5), (0.3, float("inf")))
    drawn = svg(
        Plot(
            "<s>",
            "&",
            (
                Series("other", points, joined=True),
                Series("win", ((0.5, 0.5),), labels=("<u>",)),
            ),
            x,
            y,
        ),
        "n",
    )
    assert not re.search(r"<(b|i|s|u)>|nan|inf", drawn) and drawn.count("<path") == 2 and "&lt;u&gt;" in drawn
    assert key_mark("win") != key_mark("other") != key_mark("win", bar=True)


def test_labels_keep_apart():
    """Two points side by side, and one above: no label covers a mark or another label, on any page."""
    points, labels = [(0.5, 100.0), (0.53, 100.0), (0.5, 80.0)], ["1 first", "2 second", "3"]
    found = placed(points, labels)
    assert [label for _, label in found] == labels
    for page in (NARROW, WIDE):
        boxes = []
        for (place, label), (x, y) in zip(found, points, strict=True):
            words = label if page == WIDE else label.split()[0]
            boxes.append(place.box(x * page, y, 6.6 * len(words)))
        marks = [(x * page - 5, y - 5, x * page + 5, y + 5) for x, y in points]
        for i, box in enumerate(boxes):
            for other in (*marks, *boxes[:i]):
                apart = box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
                assert apart


def test_labels_keep_off_a_line():
    rising = [(0.2, 200.0), (0.5, 100.0), (0.8, 20.0)]
    assert placed([(0.5, 100.0)], ["1"], rising)[0] != placed([(0.5, 100.0)], ["1"])[0]


def test_names_without_room_are_dropped():
    points = [(0.5 + i / 100, 100.0 + j) for i in range(-2, 3) for j in (-6, 0, 6)] + [(0.1, 20.0)]
    labels = [f"{i} a_very_long_name_{i}" for i in range(len(points))]
    found = [label for _, label in placed(points, labels)]
    assert found[-1] == labels[-1] and "7" in found
    assert all(short in (label, label.split()[0]) for short, label in zip(found, labels, strict=True))


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (FullConfig(), 'pipeline("image-classification", model="best")'),
        (PEFTConfig(), 'pipeline("image-classification", model="best")'),
        (PEFTConfig(merge=False), 'load_trained("best").model'),
        (SpotTuneConfig(), "import hf_ft  # registers the model"),
    ],
)
def test_the_code_that_loads_the_winner_fits_it(config, shown):
    results = Results.from_dict(made_up_results.comparison())
    contenders = [dataclasses.replace(one, configs=(config.to_dict(),)) for one in results.contenders]
    assert shown in usage(dataclasses.replace(results, contenders=tuple(contenders)))
