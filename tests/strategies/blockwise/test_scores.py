"""The result of a search: its best candidate, file, tables and plot."""

import builtins
import json
import math
import sys

import pytest

from hf_ft.errors import OptionError
from hf_ft.strategies.blockwise.candidates import Candidate, baseline_candidates, candidates, quarter_of, top_layers
from hf_ft.strategies.blockwise.plot import plot_scores
from hf_ft.strategies.blockwise.scores import BlockScore, BlockScores, layers_shown
from hf_ft.testing.models import tiny_mobilenet_v2

LAYERS = 8


def candidate(name, *layers):
    return Candidate(name, (f"net.{name}",), layers, quarter_of(layers, LAYERS), 10 * len(layers))


def score(name, layers, *values, **more):
    return BlockScore(candidate(name, *layers), values, **more)


def found(*scores, seeds=(0, 1), baselines=True):
    named = {"head": BlockScore(Candidate("head", (), (), 0, 0), (0.5, 0.6), epochs=4, seconds=2.0)}
    named["all"] = score("all", range(LAYERS), 0.7, 0.8, epochs=4, seconds=9.4)
    return BlockScores("window", "balanced_accuracy", LAYERS, seeds, scores, named if baselines else {})


@pytest.fixture
def some():
    return found(
        score("window6-7", (6, 7), 0.75, 0.85, epochs=4, seconds=3.25),  # centre 6.5: Q4
        score("window5-6", (5, 6), 0.9, pruned=True, epochs=1, seconds=1.0),
        score("window4-5", (4, 5), 0.7, 0.9, epochs=4, seconds=5.0),  # centre 4.5: Q3
        score("window0-1", (0, 1), 0.3, math.nan, epochs=4, seconds=6.0),
    )


def test_mean_and_std():
    several = score("a", (0,), 0.2, 0.4, 0.9)
    assert several.mean == pytest.approx(0.5)
    assert several.std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    one = score("a", (0,), 0.25)
    assert one.mean == 0.25 and one.std is None and one.shown() == "0.250"
    assert several.shown() == "0.500 ± 0.361"
    diverged = score("a", (0,), 0.5, math.nan)
    assert math.isnan(diverged.mean) and math.isnan(diverged.std) and not diverged.ranks
    with pytest.raises(ValueError, match="a has no score"):
        score("a", (0,))


def test_best_is_neither_pruned_nor_diverged_and_ties_go_to_the_last(some):
    assert some.best.candidate.name == "window6-7"  # 0.8 like window4-5, but nearer the output
    assert found(*some.scores[::-1]).best is some.scores[0]
    assert found(*some.scores[2:]).best is some.scores[2]
    for left in (some.scores[1:2], some.scores[3:], ()):
        with pytest.raises(ValueError, match="no candidate was trained to the end"):
            _ = found(*left).best


def test_best_in_a_quarter(some):
    assert [q and q.candidate.name for q in map(some.best_in, (1, 2, 3, 4))] == [None, None, "window4-5", "window6-7"]
    better = score("window5-7", (5, 6, 7), 0.81, 0.81)  # centre 6: Q4
    assert found(*some.scores, better).best_in(4) is better


def test_last_quarter_does_not_depend_on_scores(some):
    worst = score("layer7", (7,), 0.1, pruned=True)
    assert found(*some.scores, worst).last_quarter is worst
    assert found(*some.scores[2:]).last_quarter is some.scores[2]  # none in the fourth: the nearest to the output
    with pytest.raises(OptionError, match="no candidates"):
        _ = found().last_quarter


def test_round_trip(some):
    text = json.dumps(some.to_dict(), allow_nan=False)
    back = BlockScores.from_dict(json.loads(text))
    assert back.to_dict() == some.to_dict() and back.scores[:3] == some.scores[:3]
    assert back.baselines == some.baselines and back.seeds == some.seeds
    assert math.isnan(back.scores[3].scores[1]) and back.scores[3].scores[0] == 0.3
    exact = found(some.scores[0])
    assert BlockScores.from_dict(json.loads(json.dumps(exact.to_dict()))) == exact
    entry = some.to_dict()["scores"][0]
    assert entry["mean"] == pytest.approx(0.8) and entry["std"] == pytest.approx(0.1 / math.sqrt(2))
    assert entry["candidate"] == {
        "name": "window6-7",
        "modules": ["net.window6-7"],
        "layers": [6, 7],
        "quarter": 4,
        "parameters": 20,
    }


@pytest.mark.parametrize("missing", ["scheme", "scores", "baselines", "seeds"])
def test_a_file_with_a_gap_is_refused(missing, some):
    content = some.to_dict()
    del content[missing]
    with pytest.raises(ValueError, match=f"not block scores: '{missing}' is missing"):
        BlockScores.from_dict(content)


def test_table_and_markdown(some):
    headers, rows = some.table()
    assert headers == ("candidate", "quarter", "layers", "parameters", "score", "epochs", "seconds", "note")
    assert rows == [
        ("window6-7", "Q4", "6-7", "20", "0.800 ± 0.071", "4", "3", "best"),
        ("window5-6", "Q3", "5-6", "20", "0.900", "1", "1", "pruned"),
        ("window4-5", "Q3", "4-5", "20", "0.800 ± 0.141", "4", "5", ""),
        ("window0-1", "Q1", "0-1", "20", "nan ± nan", "4", "6", "diverged"),
        ("head", "", "-", "0", "0.550 ± 0.071", "4", "2", "baseline"),
        ("all", "", "0-7", "80", "0.750 ± 0.071", "4", "9", "baseline"),
    ]
    text = some.markdown()
    assert text.startswith(
        "Scheme `window`, 8 layers; score: balanced_accuracy, mean ± std of 2 seeds.\n\n| candidate |"
    )
    assert "| window6-7 | Q4 | 6-7 | 20 | 0.800 ± 0.071 | 4 | 3 | best |" in text
    assert "- best: window6-7, 0.800 ± 0.071, quarter 4\n" in text
    assert "- last of the fourth quarter, without search: window6-7, " in text and "- head only: head, 0.550" in text
    alone = found(some.scores[1], seeds=(0,), baselines=False)
    assert "one seed" in alone.markdown() and "- best: none\n- best in the fourth quarter: none\n" in alone.markdown()
    assert "without search: window5-6, 0.900, quarter 3, pruned" in alone.markdown()


@pytest.mark.parametrize(
    ("layers", "shown"), [((), "-"), ((3,), "3"), ((5, 6, 7), "5-7"), ((0, 4, 9), "0, 4, 9"), ((1, 3), "1, 3")]
)
def test_layers_shown(layers, shown):
    assert layers_shown(layers) == shown


# --- the plot ---------------------------------------------------------------------------------------------


def searched(scheme, seeds=2):
    """Made-up scores of a tiny MobileNetV2, better towards the output; every fifth is pruned."""
    model = tiny_mobilenet_v2()
    made = top_layers(model, [40, 51, 3]) if scheme == "top_layers" else candidates(model, scheme)
    scores = [
        BlockScore(c, tuple(0.7 + c.centre / 500 + 0.01 * seed for seed in range(seeds)), pruned=i % 5 == 4)
        for i, c in enumerate(made)
    ]
    named = baseline_candidates(model)
    baselines = {name: BlockScore(c, (0.7, 0.72)[:seeds]) for name, c in named.items()}
    return BlockScores(scheme, "accuracy", 52, tuple(range(seeds)), tuple(scores), baselines)


@pytest.fixture
def drawn(monkeypatch):
    """Every saved figure."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("scheme", ["stage", "window", "top_layers"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_plot_shows_candidates_quarters_and_baselines(scheme, seeds, drawn, tmp_path):
    scores = searched(scheme, seeds)
    plot_scores(scores, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    (axes,) = figure.axes
    quarters = [] if scheme == "top_layers" else ["Q1", "Q2", "Q3", "Q4"]
    best = scores.best.candidate.name
    names = [best] if scheme == "window" else [s.candidate.name for s in scores.scores]
    shown = [f"{name} {scores.best.mean:.3f}" if name == best else name for name in names]
    assert texts(figure) == quarters + shown
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == [
        f"head only {scores.baselines['head'].mean:.3f}",
        f"all layers {scores.baselines['all'].mean:.3f}",
    ]
    assert ("pruned" in labels) == any(s.pruned for s in scores.scores)
    assert {"best"} < set(labels) and ("candidate, mean ± std" in labels) == (seeds == 2)
    assert len(axes.containers) == len(scores.scores)  # one mark with error bars each


def test_quarters_of_the_plot_are_those_of_the_candidates(drawn, tmp_path):
    scores = searched("layer")
    plot_scores(scores, tmp_path / "plot.svg")
    borders = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in drawn[0].axes[0].patches[:4]]
    for entry in scores.scores:
        left, right = borders[entry.candidate.quarter - 1]
        assert left < entry.candidate.centre < right


def test_plot_of_few_layers_and_of_nothing_finite(drawn, tmp_path):
    two = BlockScores("layer", "accuracy", 2, (0,), (BlockScore(Candidate("layer1", ("a",), (1,), 3, 1), (0.5,)),))
    plot_scores(two, tmp_path / "two.png")
    assert texts(drawn[0])[-1] == "layer1 0.500"
    nothing = found(score("window0-1", (0, 1), math.nan), seeds=(0,))
    plot_scores(nothing, tmp_path / "nothing.png")
    assert texts(drawn[1]) == ["Q1", "Q2", "Q3", "Q4"]


def test_a_missing_matplotlib_is_named_with_its_extra(some, monkeypatch, tmp_path):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'hf-ft\[report\]'"):
        plot_scores(some, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
