"""Means with intervals over prompts and seeds.

Pictures of one prompt are alike, and so are those of one seed. So prompts and seeds are drawn anew, with replacement,
each by itself, and a picture counts as often as its prompt times as often as its seed (Owen 2007, the pigeonhole
bootstrap).
With one seed this is the ordinary bootstrap over prompts, and with one prompt that over seeds. Limits are percentiles:
with fewer than ten prompts they are narrower than they should be.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

from infer.report.results import Estimate

TIMES = 4000
LEVEL = 0.95
Unit = tuple[Hashable, Hashable]  # what a value belongs to: a prompt and a seed, or two other things that vary


@lru_cache(maxsize=8)
def _counts(size: int, axis: int) -> np.ndarray:
    """How often each of `size` prompts (axis 0) or seeds (axis 1) is drawn, [TIMES, size]; the same in every call, so
    that differences are paired.

    A single one is always drawn once.
    """
    draws = np.random.default_rng([0, axis, size])
    return draws.multinomial(size, np.full(size, 1 / size), TIMES).astype(np.float64)


def means(values: np.ndarray, units: Sequence[Unit]) -> np.ndarray:
    """The means of [n] values in each of the bootstrap's draws; draws that hold none of them are left out."""
    weights = np.ones((TIMES, len(values)))
    for axis, names in enumerate(zip(*units, strict=True)):
        index = {name: i for i, name in enumerate(dict.fromkeys(names))}
        weights = weights * _counts(len(index), axis)[:, [index[name] for name in names]]
    total = weights.sum(1)
    held = total > 0
    drawn: np.ndarray = (weights[held] @ values) / total[held]
    return drawn


def interval(values: Sequence[float | None], units: Sequence[Unit], level: float = LEVEL) -> Estimate | None:
    """The mean of the values that are not None, with its limits; None if there are none. Of one prompt with one seed
    no limits are known.

    units: the prompt and the seed of each value.
    """
    defined = [(value, unit) for value, unit in zip(values, units, strict=True) if value is not None]
    if not defined:
        return None
    numbers = np.array([value for value, _ in defined], dtype=np.float64)
    units = [unit for _, unit in defined]
    mean = float(numbers.mean())
    if len(set(units)) < 2:
        return Estimate(mean, None, None, len(numbers))
    low, high = np.quantile(means(numbers, units), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), len(numbers))


def difference(
    values: dict[Unit, float | None], others: dict[Unit, float | None], level: float = LEVEL
) -> Estimate | None:
    """The mean of value - other for the same prompt and seed, where both are defined, with its limits."""
    pairs = {
        unit: value - other
        for unit, value in values.items()
        if value is not None and (other := others.get(unit)) is not None
    }
    return interval(list(pairs.values()), list(pairs), level)
