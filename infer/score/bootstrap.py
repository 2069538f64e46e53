"""Means with intervals over prompts and seeds.

Pictures of one prompt are alike, and so are those of one seed: prompts and seeds are drawn anew, with replacement, each
by itself, and a picture counts as often as its prompt times as often as its seed (Owen 2007, the pigeonhole bootstrap).
With one seed this is the ordinary bootstrap over prompts, and with one prompt that over seeds. Limits are percentiles:
with fewer than ten prompts they are narrower than they should be.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

TIMES = 4000
LEVEL = 0.95
Place = tuple[Hashable, Hashable]  # a prompt and a seed, or whatever else two things vary


class Interval(NamedTuple):
    """A mean, its limits, and how many pictures (or other values) it is of."""

    mean: float
    low: float | None  # None: of one prompt with one seed nothing can be said
    high: float | None
    pictures: int


@lru_cache(maxsize=8)
def _counts(size: int, stream: int) -> np.ndarray:
    """How often each of `size` things is drawn, [TIMES, size]; the same in every call, so that differences are paired.

    A single thing is always drawn once.
    """
    draws = np.random.default_rng([0, stream, size])
    return draws.multinomial(size, np.full(size, 1 / size), TIMES).astype(np.float64)


def means(values: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """The means of [n] values in each of the bootstrap's draws; draws that hold none of them are left out."""
    weights = np.ones((TIMES, len(values)))
    for stream, things in enumerate(zip(*places, strict=True)):
        order = {thing: i for i, thing in enumerate(dict.fromkeys(things))}
        weights = weights * _counts(len(order), stream)[:, [order[thing] for thing in things]]
    total = weights.sum(1)
    held = total > 0
    drawn: np.ndarray = (weights[held] @ values) / total[held]
    return drawn


def interval(values: Sequence[float | None], places: Sequence[Place], level: float = LEVEL) -> Interval | None:
    """The mean of the values that are not None, with its limits; None if there are none.

    places: the prompt and the seed of each value.
    """
    defined = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
    if not defined:
        return None
    own = np.array([value for value, _ in defined], dtype=np.float64)
    there = [place for _, place in defined]
    mean = float(own.mean())
    if len(set(there)) < 2:
        return Interval(mean, None, None, len(own))
    low, high = np.quantile(means(own, there), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(own))


def difference(
    values: dict[Place, float | None], others: dict[Place, float | None], level: float = LEVEL
) -> Interval | None:
    """The mean of value - other at the same place, where both are defined, with its limits."""
    pairs = {
        place: value - other
        for place, value in values.items()
        if value is not None and (other := others.get(place)) is not None
    }
    return interval(list(pairs.values()), list(pairs), level)
