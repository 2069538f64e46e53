"""Intervals against scipy's, against a bootstrap written out, and on values whose limits are known."""

import numpy as np
import pytest
from scipy import stats

from infer.score.bootstrap import difference, interval


def crossed(prompts: int, seeds: int) -> list[tuple[str, int]]:
    return [(f"prompt {i}", seed) for i in range(prompts) for seed in range(seeds)]


@pytest.mark.parametrize("prompts, seeds", [(30, 1), (1, 30)])
def test_one_thing_that_varies_is_scipys_bootstrap(prompts: int, seeds: int) -> None:
    values = np.random.default_rng(1).gamma(2.0, 3.0, 30)
    found = interval(list(values), crossed(prompts, seeds))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=2).confidence_interval
    assert found is not None and found.mean == pytest.approx(values.mean()) and found.pictures == 30
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_prompts_and_seeds_are_both_drawn() -> None:
    """Against drawing them one by one; pictures drawn singly would give limits half as wide."""
    rng = np.random.default_rng(3)
    table = 5 * rng.normal(size=(12, 1)) + 3 * rng.normal(size=(1, 4)) + rng.normal(size=(12, 4))
    found = interval(list(table.ravel()), crossed(12, 4))
    drawn = [table[np.ix_(rng.integers(12, size=12), rng.integers(4, size=4))].mean() for _ in range(20000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found is not None
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.04 * (high - low))
    singly = stats.bootstrap((table.ravel(),), np.mean, method="percentile", rng=2).confidence_interval
    assert high - low > 1.8 * (singly.high - singly.low)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(4)
    places = crossed(20, 2)
    base = {place: float(value) for place, value in zip(places, 50 * rng.normal(size=40), strict=True)}
    better = {place: value + 1 + 0.1 * float(rng.normal()) for place, value in base.items()}
    found = difference(better, base)
    assert found is not None and found.mean == pytest.approx(1, abs=0.1)
    assert found.low is not None and found.high is not None
    assert 0.9 < found.low < found.mean < found.high < 1.1
    unpaired = interval(list(better.values()), places)
    assert unpaired is not None and unpaired.low is not None and unpaired.high is not None
    assert unpaired.high - unpaired.low > 10


def test_what_is_undefined() -> None:
    assert interval([None, None], crossed(2, 1)) is None
    assert interval([3.0], crossed(1, 1)) == (3.0, None, None, 1)
    assert interval([3.0, None], crossed(2, 1)) == (3.0, None, None, 1)
    assert interval([2.0, 2.0], crossed(2, 1)) == (2.0, 2.0, 2.0, 2)
    assert difference({("a", 0): 1.0, ("b", 0): None}, {("a", 0): 0.5, ("b", 0): 2.0}) == (0.5, None, None, 1)
    assert difference({("a", 0): 1.0}, {("b", 0): 1.0}) is None
    values = [1.0, 2.0, None, 4.0]
    assert interval(values, crossed(4, 1)) == interval(values, crossed(4, 1))  # the same in every call
