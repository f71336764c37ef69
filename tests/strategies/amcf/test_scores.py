"""The record of a swarm's search: its best position, file, table, verdict and plots."""

import json
import math

import numpy as np
import pytest

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.strategies.amcf.findings import swarm_findings
from hf_ft.strategies.amcf.plot import plot_scores, plot_swarm
from hf_ft.strategies.amcf.scores import Evaluation, Generation, SwarmScores
from hf_ft.strategies.amcf.swarm import begin, move, remember

MEMBERS, LAYERS = ("mobilenet_v2", "efficientnet-lite0"), (52, 49)


def generation(positions, scores):
    return Generation(tuple(positions), ((0.5, -0.5),) * len(scores), tuple(scores))


def record(evaluations, generations=(), **more):
    return SwarmScores("balanced_accuracy", MEMBERS, LAYERS, tuple(generations), tuple(evaluations), **more)


@pytest.fixture
def some():
    """Two generations of three particles; one position is visited twice."""
    return record(
        [
            Evaluation((12, 30), 0.93, epochs=3, seconds=31.6, steps=(0.8, 0.93, 0.92)),
            Evaluation((0, 0), 0.9, epochs=3, seconds=60.0, steps=(0.7, 0.85, 0.9)),
            Evaluation((51, 48), -math.inf, epochs=1, seconds=9.0, steps=(-math.inf,)),
            Evaluation((20, 20), 0.95, epochs=1, seconds=10.0, pruned=True, steps=(0.95,)),
            Evaluation((13, 29), 0.93, epochs=2, seconds=20.0, steps=(0.9, 0.93)),
        ],
        [
            generation([(12.7, 30.1), (0.2, 0.9), (51.0, 48.0)], [0.93, 0.9, -math.inf]),
            generation([(12.1, 30.8), (20.5, 20.5), (13.0, 29.9)], [0.93, 0.95, 0.93]),
        ],
    )


def searched(members, layers, score, pruned_below=-math.inf, iterations=2, particles=4):
    """A whole search, as a trainer would record it."""
    swarm, generations, evaluations = begin(layers, particles, seed=1), [], {}
    for left in range(iterations, -1, -1):
        for k in swarm.integers():
            evaluations.setdefault(k, Evaluation(k, score(k), pruned=score(k) < pruned_below))
        scores = [evaluations[k].score for k in swarm.integers()]
        generations.append(Generation.of(swarm, scores))
        swarm = remember(swarm, scores)
        swarm = move(swarm, layers, iterations, seed=1) if left else swarm
    return SwarmScores("balanced_accuracy", members, layers, tuple(generations), tuple(evaluations.values()))


# --- what it reports ----------------------------------------------------------------------------------------


def test_best_was_trained_to_the_end_and_ties_go_to_the_first(some):
    assert some.best is some.evaluations[0]
    assert record(some.evaluations[::-1]).best is some.evaluations[4]
    for left in (some.evaluations[2:4], ()):
        with pytest.raises(OptionError, match="no position was trained to the end .* lower the learning rate"):
            _ = record(left).best


def test_visits_count_each_generation_and_the_trained_part_of_a_stopped_one(some):
    assert some.visits == 6
    assert record(some.evaluations, some.generations[:1]).visits == 3 + 2  # (20, 20) and (13, 29)


def test_verdict(some):
    assert some.verdict() == (
        "12 of 52 layers of mobilenet_v2 and 30 of 49 of efficientnet-lite0 frozen (balanced accuracy 0.930 on "
        "held-out training samples); 5 distinct positions were trained in 6 visits, 1 of them pruned; with nothing "
        "frozen: 0.900."
    )
    best = some.evaluations[0]
    stopped = record([best], stopped="after 2 hours.").verdict()
    assert stopped.endswith("1 distinct positions were trained in 1 visits. The search ended early: after 2 hours.")


def test_verdict_if_runs_were_pruned_or_diverged():
    pruned = record([Evaluation((0, 0), 0.5, pruned=True)])
    assert pruned.verdict().startswith("no position was trained to the end with a finite score; 1 distinct")
    assert pruned.verdict().endswith("with nothing frozen: 0.500 (pruned).")
    assert record([Evaluation((0, 0), -math.inf)]).verdict().endswith("with nothing frozen: training diverged.")


@pytest.mark.parametrize(
    ("layers", "start"),
    [
        ((5,), "1 of 5 layers of a frozen (accuracy 0.500"),
        ((5, 6, 7), "1 of 5 layers of a, 1 of 6 of b and 1 of 7 of c frozen (accuracy 0.500"),
    ],
)
def test_verdict_for_any_number_of_models(layers, start):
    position = (1,) * len(layers)
    found = SwarmScores("accuracy", tuple("abc"[: len(layers)]), layers, (), (Evaluation(position, 0.5),))
    assert found.verdict().startswith(start)


def test_table_has_the_highest_score_first(some):
    headers, rows = some.table()
    assert headers == ("mobilenet_v2", "efficientnet-lite0", "score", "epochs", "seconds", "note")
    assert rows == [
        ("20 of 52", "20 of 49", "0.950", "1", "10", "pruned"),
        ("12 of 52", "30 of 49", "0.930", "3", "32", "best"),
        ("13 of 52", "29 of 49", "0.930", "2", "20", ""),
        ("0 of 52", "0 of 49", "0.900", "3", "60", ""),
        ("51 of 52", "48 of 49", "-inf", "1", "9", "diverged"),
    ]


def test_evaluation_of_a_position(some):
    assert some.evaluation([0, 0]) is some.evaluations[1] and some.evaluation((1, 1)) is None


# --- what is written and read -------------------------------------------------------------------------------


def test_round_trip_through_strict_json(some):
    text = json.dumps(some.to_dict(), allow_nan=False)
    assert SwarmScores.from_dict(json.loads(text)) == some
    entry = json.loads(text)["evaluations"][2]
    assert entry["score"] is None and entry["steps"] == [None] and entry["position"] == [51, 48]
    assert json.loads(text)["generations"][0]["scores"] == [0.93, 0.9, None]
    stopped = record([], stopped="interrupted")
    assert SwarmScores.from_dict(json.loads(json.dumps(stopped.to_dict()))) == stopped


def test_generation_has_the_exact_numbers_of_the_swarm():
    swarm = begin(LAYERS, particles=3)
    made = Generation.of(swarm, [0.1, np.float32(0.5), -math.inf])
    (back,) = SwarmScores.from_dict(json.loads(json.dumps(record([], [made]).to_dict()))).generations
    assert np.array_equal(back.positions, swarm.positions) and np.array_equal(back.velocities, swarm.velocities)
    assert back.integers() == swarm.integers() and back.scores == (0.1, 0.5, -math.inf)


@pytest.mark.parametrize("missing", ["metric", "members", "generations", "evaluations", "stopped"])
def test_a_file_with_a_gap_is_refused(missing, some):
    content = some.to_dict()
    del content[missing]
    with pytest.raises(CheckpointError, match=f"not swarm scores: '{missing}' is missing"):
        SwarmScores.from_dict(content)


def test_a_damaged_file_is_refused(some):
    content = some.to_dict()
    content["evaluations"][0]["position"] = [52, 0]
    with pytest.raises(CheckpointError, match=r"not swarm scores: position \(52, 0\) does not match"):
        SwarmScores.from_dict(content)
    content["evaluations"] = 3
    with pytest.raises(CheckpointError, match="evaluations is 3, not a list"):
        SwarmScores.from_dict(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evaluation((1, 1), math.nan), r"score of position \(1, 1\) is nan or inf"),
        (lambda: Evaluation((1, 1), 0.5, steps=(0.5, math.inf)), "nan or inf"),
        (lambda: generation([(1.0, 1.0)], [math.nan]), "score of a generation is nan"),
        (lambda: generation([(1.0, 1.0)], [0.1, 0.2]), "1 positions, 2 velocities and 2 scores"),
        (lambda: Generation((), (), ()), "0 positions, 0 velocities and 0 scores"),
        (lambda: record([Evaluation((1, -1), 0.5)]), r"position \(1, -1\) does not match"),
        (lambda: record([Evaluation((1,), 0.5)]), r"position \(1,\) does not match"),
        (lambda: record([Evaluation((1, 1), 0.5)] * 2), r"position \(1, 1\) was evaluated twice"),
        (lambda: record([], [generation([(1.0, 49.0)], [0.5])]), r"position \(1, 49\) does not match"),
        (lambda: SwarmScores("accuracy", ("a",), (2, 3)), "differ in length"),
        (lambda: SwarmScores("accuracy", (), ()), "members is empty"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(OptionError, match=message):
        make()


# --- the plots ----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Every saved figure."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def marks(axes):
    """Offsets of the marks by the label of their kind."""
    return {str(kind.get_label()): kind.get_offsets() for kind in axes.collections}


def test_plot_swarm_shows_each_particle_in_each_panel(some, drawn, tmp_path):
    plot_swarm(some, tmp_path / "swarm.png")
    assert (tmp_path / "swarm.png").read_bytes().startswith(b"\x89PNG")
    *panels, bar = drawn[0].axes
    assert [axes.get_title() for axes in panels] == list(MEMBERS) and bar.get_ylabel() == "balanced accuracy"
    for member, axes in enumerate(panels):
        assert {kind: len(places) for kind, places in marks(axes).items()} == {
            "trained to the end": 4,
            "diverged": 1,
            "pruned": 1,
        }
        shown = sorted((round(x), y) for places in marks(axes).values() for x, y in places)
        visited = [(t, k[member]) for t, found in enumerate(some.generations) for k in found.integers()]
        assert shown == sorted(visited)
        assert axes.get_ylim() == (-0.5, LAYERS[member] - 0.5)
    assert legend(drawn[0]) == ["best so far", "trained to the end", "diverged", "pruned"]


def test_plot_swarm_colours_by_score_on_one_scale(some, drawn, tmp_path):
    plot_swarm(some, tmp_path / "swarm.png")
    for axes in drawn[0].axes[:2]:
        colours = {str(kind.get_label()): kind for kind in axes.collections}
        assert colours["trained to the end"].get_array().tolist() == [0.93, 0.9, 0.93, 0.93]
        assert colours["pruned"].get_array().tolist() == [0.95] and colours["diverged"].get_array() is None
        assert {kind.norm.vmin for kind in colours.values() if kind.get_array() is not None} == {0.9}
        assert colours["pruned"].norm.vmax == 0.95


def test_line_of_the_best_so_far_leaves_out_what_was_pruned(drawn, tmp_path):
    evaluations = [Evaluation((k, k), s, pruned=k == 3) for k, s in ((1, 0.4), (2, 0.6), (3, 0.9), (4, 0.6), (5, 0.7))]
    steps = [[(3.0, 3.0), (1.0, 1.0)], [(2.0, 2.0), (1.0, 1.0)], [(4.0, 4.0), (4.0, 4.0)], [(5.0, 5.0), (1.0, 1.0)]]
    scores = [[0.9, 0.4], [0.6, 0.4], [0.6, 0.6], [0.7, 0.4]]
    plot_swarm(record(evaluations, map(generation, steps, scores)), tmp_path / "swarm.png")
    (line,) = drawn[0].axes[0].lines
    assert list(line.get_ydata()) == [1, 2, 2, 5]  # a tie keeps the older


def test_heat_map_is_coloured_where_a_particle_was(some, drawn, tmp_path):
    plot_scores(some, tmp_path / "scores.svg")
    axes, bar = drawn[0].axes
    cells = axes.images[0].get_array()
    assert cells.shape == (49, 52) and cells.count() == 4  # one of five diverged
    assert {(k1, k2): cells[k2, k1] for k2, k1 in np.argwhere(~cells.mask)} == {
        found.position: found.score for found in some.evaluations if math.isfinite(found.score)
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == tuple(f"frozen layers of {name}" for name in MEMBERS)
    assert axes.get_xlim() == (-0.5, 51.5) and axes.get_ylim() == (-0.5, 48.5)
    places = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert places == {"pruned": [[20, 20]], "diverged": [[51, 48]], "best: 12, 30 frozen, 0.930": [[12, 30]]}
    assert legend(drawn[0]) == list(places) and bar.get_ylabel() == "balanced accuracy"


def test_heat_map_shows_a_pruned_run_that_diverged_as_diverged(drawn, tmp_path):
    plot_scores(record([Evaluation((3, 4), -math.inf, pruned=True)]), tmp_path / "scores.png")
    assert legend(drawn[0]) == ["diverged"]


def test_one_model_is_drawn_as_a_curve(drawn, tmp_path):
    scores = (0.2, 0.5, -math.inf, 0.4)
    found = tuple(Evaluation((k,), s, pruned=k == 0) for k, s in enumerate(scores))
    plot_scores(SwarmScores("accuracy", ("resnet",), (5,), (), found[::-1]), tmp_path / "scores.png")
    axes, bar = drawn[0].axes
    assert {kind: places.tolist() for kind, places in marks(axes).items()} == {
        "trained to the end": [[3, 0.4], [1, 0.5]],
        "pruned": [[0, 0.2]],
        "diverged": [[2, 0]],
    }
    curve, best = axes.lines
    assert curve.get_xydata().tolist() == [[1, 0.5], [3, 0.4]] and best.get_xydata().tolist() == [[1, 0.5]]
    assert axes.get_xlabel() == "frozen layers of resnet" and axes.get_ylabel() == bar.get_ylabel() == "accuracy"
    assert axes.get_xlim() == (-0.5, 4.5)


@pytest.mark.parametrize("layers", [(6,), (6, 1), (6, 5)])
@pytest.mark.parametrize("score", [lambda k: -math.inf, lambda k: 0.5, lambda k: 0.1 * sum(k)])
def test_plots_of_a_search_that_found_little(layers, score, drawn, tmp_path):
    found = searched(tuple("ab"[: len(layers)]), layers, score, pruned_below=0.2)
    for plot in (plot_swarm, plot_scores):
        plot(found, tmp_path / f"{plot.__name__}.png")
    assert len(list(tmp_path.iterdir())) == 2
    with_bar = [len(figure.axes) > panels for figure, panels in zip(drawn, (len(layers), 1), strict=True)]
    assert with_bar == [score((1,)) > -math.inf] * 2  # no colour scale if there are no scores
    for figure in drawn:
        shown = [tick for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for tick in axis.get_majorticklocs()]
        assert all(tick == round(tick) for tick in shown) or len(layers) == 1  # a curve's heights are the scores


def test_plots_refuse_what_they_cannot_show(some, tmp_path):
    three = searched(tuple("abc"), (3, 4, 5), sum)
    plot_swarm(three, tmp_path / "swarm.png")
    with pytest.raises(OptionError, match="one or two models, not the 3 .* use plot_swarm"):
        plot_scores(three, tmp_path / "scores.png")
    with pytest.raises(OptionError, match="no finished generation"):
        plot_swarm(record(some.evaluations), tmp_path / "none.png")
    assert [file.name for file in tmp_path.iterdir()] == ["swarm.png"]


def test_a_search_that_ended_in_its_first_generation_is_shown_as_far_as_it_got(some, tmp_path):
    found = swarm_findings(record(some.evaluations))
    assert found.blocks and found.write(tmp_path) == ["swarm.json", "swarm_scores.png"]
    assert found.summary == record(some.evaluations).verdict()
