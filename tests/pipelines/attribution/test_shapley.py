"""What makes a division of a gain the fair one: nothing is lost, equals are equal, who does nothing gets nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipelines.attribution import shapley
from pipelines.attribution.shapley import Coalition, Game


def worth(game: Game, value: dict[Coalition, np.ndarray]) -> np.ndarray:
    return np.stack([value[each] for each in game.coalitions])


def drawn(causes: int, seed: int, questions: int = 3) -> dict[Coalition, np.ndarray]:
    """Any worth at all."""
    random = np.random.default_rng(seed)
    return {each: random.random(questions) for each in shapley.subsets(causes)}


def orders(causes: int, number: int, seed: int = 0) -> list[shapley.Order]:
    return shapley.affordable_orders(causes, lambda each: each, set(), number * 2 * causes, seed)


@pytest.mark.parametrize("causes", [1, 2, 3, 5])
def test_parts_add_up_to_the_gain_of_every_question(causes: int) -> None:
    value = drawn(causes, causes)
    gain_Q = value[frozenset(range(causes))] - value[frozenset()]
    for game in (shapley.exact(causes), shapley.sampled(causes, orders(causes, 4))):
        np.testing.assert_allclose(game.parts(worth(game, value)).sum(axis=0), gain_Q, atol=1e-12)


def test_exact_parts_are_the_mean_over_all_orders() -> None:
    value = drawn(4, 1)
    game = shapley.exact(4)
    every = list(itertools.permutations(range(4)))
    expected = np.zeros((4, 3))
    for order in every:
        for place, cause in enumerate(order):
            before = frozenset(order[:place])
            expected[cause] += (value[before | {cause}] - value[before]) / len(every)
    np.testing.assert_allclose(game.parts(worth(game, value)), expected, atol=1e-12)
    all_drawn = shapley.sampled(4, every)
    np.testing.assert_allclose(all_drawn.parts(worth(all_drawn, value)), expected, atol=1e-12)


def test_equal_causes_have_equal_parts_and_idle_ones_none() -> None:
    """0 and 1 do the same, but only once; 2 adds a fifth to whatever is there; 3 does nothing."""
    value = {each: np.array([0.1 + 0.5 * bool(each & {0, 1}) + 0.2 * (2 in each)]) for each in shapley.subsets(4)}
    game = shapley.exact(4)
    np.testing.assert_allclose(game.parts(worth(game, value))[:, 0], [0.25, 0.25, 0.2, 0.0], atol=1e-12)


def test_the_error_of_drawing_orders_is_known() -> None:
    """Over many drawings the parts spread as each of them says; where causes only add up there is no error."""
    value, found, said = drawn(5, 2, 1), [], []
    for seed in range(400):
        game = shapley.sampled(5, orders(5, 6, seed))
        found.append(game.parts(worth(game, value))[:, 0])
        said.append(game.drawing_variance(worth(game, value)[:, 0]))
    exact = shapley.exact(5)
    np.testing.assert_allclose(np.mean(found, axis=0), exact.parts(worth(exact, value))[:, 0], atol=0.02)
    np.testing.assert_allclose(np.mean(said, axis=0), np.var(found, axis=0), rtol=0.35)
    adding = {each: np.array([sum(each) / 10.0]) for each in shapley.subsets(5)}
    game = shapley.sampled(5, orders(5, 4))
    np.testing.assert_allclose(game.drawing_variance(worth(game, adding)[:, 0]), 0, atol=1e-20)


def test_orders_are_drawn_as_far_as_the_budget_goes() -> None:
    """A larger one only adds to them, and coalitions of equal data are paid once."""
    few, many = (shapley.affordable_orders(6, lambda each: each, set(), budget, 3) for budget in (25, 45))
    assert 2 <= len(few) < len(many) and many[: len(few)] == few
    for chosen, budget in ((few, 25), (many, 45)):
        assert len(shapley.sampled(6, chosen).coalitions) <= budget
    sizes = shapley.affordable_orders(6, len, {0, 6}, 5, 3)
    assert len(sizes) > len(many), "sizes are all there is to pay for"
