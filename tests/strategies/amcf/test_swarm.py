"""The particle swarm: each step against plain arithmetic, its memory, and that it finds an optimum."""

import dataclasses
import math

import numpy as np
import pytest

from hf_ft.errors import OptionError
from hf_ft.strategies.amcf.swarm import (
    Swarm,
    begin,
    generator,
    inertia,
    move,
    remember,
    step,
    truncated,
    velocity_bound,
)

LAYERS = (49, 20)  # velocity bounds 5 and 2


def swarm(positions, velocities, best=None, best_scores=None, leader=None, leader_score=0.0, generation=0):
    """A swarm; by default, all particles are at their best position, and so is the leader."""
    best = positions if best is None else best
    best_scores = [0.0] * len(positions) if best_scores is None else best_scores
    leader = positions[0] if leader is None else leader
    return Swarm(generation, positions, velocities, best, best_scores, leader, leader_score)


def clipped(value, low, high):
    return min(max(value, low), high)


def moved(state, layers, iterations, seed):
    """Positions and velocities after a move, computed by the formula, one number at a time."""
    positions, velocities = [], []
    for i, here in enumerate(state.positions):
        r1, r2 = np.random.default_rng([seed, state.generation + 1, i]).random(2)
        xs, vs = [], []
        for j, count in enumerate(layers):
            bound = max(1, round(0.1 * count))
            own = state.best_positions[i][j] - here[j]
            shared = state.leader[j] - here[j]
            w = 1.4 - state.generation * 0.7 / iterations
            v = w * state.velocities[i][j] + 1.5 * r1 * own + 1.5 * r2 * shared
            vs.append(clipped(v, -bound, bound))
            xs.append(clipped(here[j] + vs[-1], 0, count - 1))
        positions.append(xs)
        velocities.append(vs)
    return positions, velocities


def wave(position):
    """A score that favours no corner."""
    return sum(math.sin(0.3 * k + j) for j, k in enumerate(position))


def run(layers, score, particles=10, iterations=5, seed=0):
    """All generations of a search, the last one with its scores."""
    state, states = begin(layers, particles, seed), []
    for _ in range(iterations):
        states.append(state)
        state = step(state, [score(k) for k in state.integers()], layers, iterations, seed)
    return [*states, remember(state, [score(k) for k in state.integers()])]


# --- constants ----------------------------------------------------------------------------------------------


def test_velocity_bound_is_a_tenth_of_the_layers_and_at_least_one():
    assert velocity_bound((49, 52, 1, 4, 16, 200)).tolist() == [5, 5, 1, 1, 2, 20]


def test_inertia_falls_to_half_over_the_iterations():
    assert [inertia(t, 5) for t in range(5)] == pytest.approx([1.4, 1.26, 1.12, 0.98, 0.84])
    assert inertia(0, 1) == 1.4 and inertia(7, 10) == pytest.approx(0.91)


# --- the start ----------------------------------------------------------------------------------------------


def test_start_is_uniform_within_the_layers_and_bounds():
    state = begin((49, 20, 1), particles=2000, seed=3)
    assert state.positions.shape == state.velocities.shape == (2000, 3)
    for values, low, high in (
        (state.positions[:, 0], 0, 48),
        (state.positions[:, 1], 0, 19),
        (state.velocities[:, 0], -5, 5),
        (state.velocities[:, 1], -2, 2),
        (state.velocities[:, 2], -1, 1),
    ):
        width = high - low
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * width  # 4.6 standard errors
        assert values.std() == pytest.approx(width / math.sqrt(12), rel=0.05)
    assert not state.positions[:, 2].any()
    assert abs(np.corrcoef(state.positions[:, 0], state.velocities[:, 0])[0, 1]) < 0.1


def test_start_is_the_documented_draws():
    state = begin(LAYERS, particles=3, seed=5)
    for i in range(3):
        a, b, c, d = np.random.default_rng([5, 0, i]).random(4)
        assert state.positions[i] == pytest.approx([48 * a, 19 * b])
        assert state.velocities[i] == pytest.approx([5 * (2 * c - 1), 2 * (2 * d - 1)])
    assert state.generation == 0 and state.leader_score == -math.inf and set(state.best_scores) == {-math.inf}


def test_each_particle_has_its_own_draws_in_each_generation():
    keys = [(seed, generation, i) for seed in range(3) for generation in range(6) for i in range(10)]
    assert len({generator(*key).random() for key in keys}) == len(keys)


# --- a move -------------------------------------------------------------------------------------------------


def test_move_without_pull_keeps_a_share_of_the_velocity():
    at_best = swarm([[10.0, 0.5]], [[2.0, -1.0]], generation=3)
    after = move(at_best, LAYERS, 5)
    assert after.velocities[0] == pytest.approx([1.96, -0.98])  # w = 1.4 - 3 * 0.14 = 0.98
    assert after.positions[0] == pytest.approx([11.96, 0.0])  # 0.5 - 0.98 lies below 0
    assert after.generation == 4


def test_move_clips_velocities_and_positions_on_both_sides():
    at_best = swarm([[10.0, 10.0], [46.0, 1.0]], [[4.0, -1.9], [4.5, -2.0]], leader=[10.0, 10.0])
    at_best = dataclasses.replace(at_best, leader_score=-math.inf)  # no pull on the second particle either
    after = move(at_best, LAYERS, 5)
    assert after.velocities.tolist() == [[5.0, -2.0], [5.0, -2.0]]  # 5.6, -2.66, 6.3 and -2.8 before
    assert after.positions.tolist() == [[15.0, 8.0], [48.0, 0.0]]


def test_move_is_pulled_by_both_best_positions():
    state = swarm([[50.0], [80.0]], [[1.0], [0.0]], best=[[52.0], [77.0]], leader=[53.0], generation=1)
    after = move(state, (200,), iterations=5, seed=9)  # bound 20: nothing is clipped
    (a, b), (c, d) = (np.random.default_rng([9, 2, i]).random(2) for i in range(2))
    assert after.velocities[0, 0] == pytest.approx(1.26 + 3.0 * a + 4.5 * b)
    assert after.velocities[1, 0] == pytest.approx(max(-20, -4.5 * c - 40.5 * d))
    assert after.positions == pytest.approx(state.positions + after.velocities)


def test_one_random_number_serves_all_coordinates_of_a_particle():
    here, pulls = np.full((4, 3), 50.0), [1.0, 2.0, -3.0]
    own = move(swarm(here, 0 * here, best=here + pulls), (200,) * 3)  # the leader is where the particles are
    shared = move(swarm(here, 0 * here, leader=here[0] + pulls), (200,) * 3)
    for after in (own, shared):
        assert after.velocities / pulls == pytest.approx(np.repeat(after.velocities[:, :1], 3, axis=1))
        assert len(set(after.velocities[:, 0])) == 4  # and a different one for each particle


@pytest.mark.parametrize("iterations", [1, 5, 8])
def test_whole_search_follows_the_formula(iterations):
    layers = (49, 20, 1, 7)
    states = run(layers, wave, particles=6, iterations=iterations, seed=11)
    assert len(states) == iterations + 1
    edges = 0
    for before, after in zip(states, states[1:], strict=False):
        known = remember(before, [wave(k) for k in before.integers()])
        positions, velocities = moved(known, layers, iterations, seed=11)
        assert after.positions == pytest.approx(np.array(positions))
        assert after.velocities == pytest.approx(np.array(velocities))
        edges += int((np.abs(after.velocities) == velocity_bound(layers)).sum())
    assert edges  # velocities were clipped


# --- what is remembered -------------------------------------------------------------------------------------


def test_remember_keeps_the_best_of_each_particle_and_of_all():
    one = remember(begin(LAYERS, 3), [0.2, 0.9, 0.4])
    assert one.best_scores.tolist() == [0.2, 0.9, 0.4] and one.leader_score == 0.9
    assert (one.leader == one.positions[1]).all() and (one.best_positions == one.positions).all()
    later = move(one, LAYERS)
    two = remember(later, [0.3, 0.1, 0.8])
    assert two.best_scores.tolist() == [0.3, 0.9, 0.8] and two.leader_score == 0.9
    expected = [later.positions[0], one.positions[1], later.positions[2]]
    assert (two.best_positions == expected).all() and (two.leader == one.positions[1]).all()
    assert (two.positions == later.positions).all() and two.generation == 1


def test_ties_keep_the_older_position_and_the_lowest_particle():
    one = remember(begin(LAYERS, 3), [0.5, 0.7, 0.7])
    assert (one.leader == one.positions[1]).all()
    two = remember(move(one, LAYERS), [0.5, 0.7, 0.7])
    assert (two.best_positions == one.positions).all() and (two.leader == one.leader).all()
    assert not (two.positions == one.positions).all()


def test_step_remembers_then_moves():
    start, scores = begin(LAYERS, 4, seed=2), [0.1, 0.4, 0.3, 0.2]
    both, halves = step(start, scores, LAYERS, 5, 2), move(remember(start, scores), LAYERS, 5, 2)
    for field in dataclasses.fields(Swarm):
        assert np.array_equal(getattr(both, field.name), getattr(halves, field.name)), field.name


# --- training runs that diverge -----------------------------------------------------------------------------


def test_diverged_particle_is_pulled_by_the_leader_only():
    start = swarm([[50.0], [60.0]], [[0.0], [0.0]], best_scores=[-math.inf] * 2, leader_score=-math.inf)
    after = step(start, [0.5, -math.inf], (200,), seed=4)
    r2 = np.random.default_rng([4, 1, 1]).random(2)[1]
    assert after.velocities[1, 0] == pytest.approx(-15 * r2)
    assert after.best_scores.tolist() == [0.5, -math.inf] and after.velocities[0, 0] == 0.0


def test_if_all_diverge_particles_keep_moving():
    states = run(LAYERS, lambda position: -math.inf)
    for before, after in zip(states[:-1], states[1:], strict=True):
        free = np.clip(inertia(before.generation) * before.velocities, [-5, -2], [5, 2])
        assert after.velocities == pytest.approx(free)
        assert np.isfinite(after.positions).all() and after.leader_score == -math.inf
    found = remember(states[-1], [-math.inf] * 9 + [0.1])  # the first finite score leads
    assert found.leader_score == 0.1 and (found.leader == found.positions[9]).all()


# --- what a search may rely on ------------------------------------------------------------------------------


def test_same_seed_same_search_and_another_seed_another():
    first, again, other = (run(LAYERS, wave, seed=seed)[-1].positions for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_particle_does_not_depend_on_how_many_there_are():
    few, many = begin(LAYERS, 3, seed=6), begin(LAYERS, 10, seed=6)
    for _ in range(3):
        assert np.array_equal(few.positions, many.positions[:3])
        few = step(few, [3, 2, 1], LAYERS, seed=6)
        many = step(many, [3, 2, 1, *[0] * 7], LAYERS, seed=6)  # the leader is among the three


def test_order_of_the_models_does_not_matter_from_the_same_start():
    order, layers = [2, 0, 1], (49, 20, 7)
    state = begin(layers, 5)
    turned = dataclasses.replace(
        state, **{name: getattr(state, name)[..., order] for name in ("positions", "velocities", "best_positions")}
    )
    for generation in range(5):
        scores = [math.sin(generation + 3 * i) for i in range(5)]
        state = step(state, scores, layers)
        turned = step(turned, scores, [layers[i] for i in order])
        assert np.array_equal(turned.positions, state.positions[:, order])


def test_arguments_are_not_changed():
    positions, scores = np.array([[3.0, 4.0], [5.0, 6.0]]), [0.1, 0.2]
    state = swarm(positions, np.ones((2, 2)))
    before = {field.name: np.copy(getattr(state, field.name)) for field in dataclasses.fields(Swarm)}
    step(state, scores, LAYERS)
    assert all(np.array_equal(getattr(state, name), value) for name, value in before.items())
    assert scores == [0.1, 0.2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.generation = 1
    with pytest.raises(ValueError, match="read-only"):
        state.positions[0, 0] = 1.0
    positions[0, 0] = 30.0  # the caller's own array
    assert state.positions[0, 0] == 3.0


def test_integers_drop_the_fraction():
    assert truncated([[0.99, 1.0], [48.0, 18.999]]) == ((0, 1), (48, 18))
    found = swarm([[0.99, 1.0], [48.0, 18.999]], np.zeros((2, 2))).integers()
    assert found == ((0, 1), (48, 18)) and all(type(k) is int for row in found for k in row)


def test_model_of_one_layer_is_never_frozen():
    for state in run((1, 1), wave, particles=4):
        assert state.integers() == ((0, 0),) * 4 and np.abs(state.velocities).max() <= 1


def test_more_of_the_optimum_is_found_than_by_random_search():
    def distance(position):
        return math.dist(position, (12, 30))

    layers, ours, random = (52, 52), [], []
    for seed in range(20):
        last = run(layers, lambda position: -(distance(position) ** 2), seed=seed)[-1]
        ours.append(math.sqrt(-last.leader_score))
        draws = np.random.default_rng(1000 + seed).integers(0, 52, (60, 2))  # as many: 10 * (5 + 1)
        random.append(min(map(distance, draws)))
    assert sum(ours) / 20 < 2 and sum(ours) < 0.5 * sum(random)


# --- what a user may get wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: begin([]), "layers is empty"),
        (lambda: begin([5, 0]), r"layers=\[5, 0\] has an entry below 1"),
        (lambda: velocity_bound([-1]), "below 1"),
        (lambda: begin(LAYERS, particles=0), "particles=0 is less than 1"),
        (lambda: begin(LAYERS, seed=-1), "seed=-1 is negative"),
        (lambda: inertia(0, 0), "iterations=0 is less than 1"),
        (lambda: inertia(5, 5), r"iteration=5 lies outside \[0, 5\)"),
        (lambda: remember(begin(LAYERS, 2), [0.1]), r"shape \(1,\), not \(2,\)"),
        (lambda: remember(begin(LAYERS, 2), [0.1, math.nan]), r"scores\[1\] is nan"),
        (lambda: step(begin(LAYERS, 1), [0.1], LAYERS, iterations=0), "iterations=0"),
        (lambda: move(run(LAYERS, wave, iterations=2)[-1], LAYERS, iterations=2), "raise iterations"),
        (lambda: move(begin(LAYERS, 1), (49, 20, 7)), r"layers=\[49, 20, 7\] does not match"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(OptionError, match=message):
        call()
