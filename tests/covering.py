"""Covering arrays: a small number of rows in which every pair of values of any two factors stands together."""

import random
from collections.abc import Callable
from itertools import combinations, product

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]  # two factors, in their own order, each with a value


def pairs_of(row: Row, factors: dict[str, list[str]]) -> list[Pair]:
    """Every two of a row's values, with their factors."""
    return list(combinations([(name, row[name]) for name in factors if name in row], 2))


def all_pairs(factors: dict[str, list[str]], allowed: Callable[[Row], bool]) -> list[Pair]:
    """Those of all factors that can stand together."""
    found: list[Pair] = []
    for (a, values), (b, others) in combinations(factors.items(), 2):
        found += [((a, x), (b, y)) for x, y in product(values, others) if allowed({a: x, b: y})]
    return found


def covering(factors: dict[str, list[str]], allowed: Callable[[Row], bool], tries: int = 20) -> list[Row]:
    """Rows that hold every allowed pair, greedily: each is the best of some that begin with a pair that is missing and
    take, factor by factor, the value that adds most. `allowed` is asked of parts of rows too; the same rows each time.
    """
    own = random.Random(0)
    missing = dict.fromkeys(all_pairs(factors, allowed))  # in order, as a set of text is not
    rows: list[Row] = []
    while missing:
        first = list(missing)
        given = [dict(own.choice(first)) for _ in range(tries)]
        filled = [_filled(dict(one), factors, allowed, missing, own) for one in given]
        candidates = [row for row in filled if row is not None]
        assert candidates, f"no row has {given[0]}: what is refused together leaves nothing for another factor"
        best = max(candidates, key=lambda row: sum(pair in missing for pair in pairs_of(row, factors)))
        rows.append({name: best[name] for name in factors})
        for pair in pairs_of(best, factors):
            missing.pop(pair, None)
    return rows


def _filled(
    row: Row,
    factors: dict[str, list[str]],
    allowed: Callable[[Row], bool],
    missing: dict[Pair, None],
    own: random.Random,
) -> Row | None:
    """The row with a value for each factor; None if none is allowed for one."""
    places = {name: i for i, name in enumerate(factors)}
    for name in own.sample([name for name in factors if name not in row], len(factors) - len(row)):
        values = own.sample(factors[name], len(factors[name]))
        possible = [value for value in values if allowed(row | {name: value})]
        if not possible:
            return None
        before = [one for one in row.items() if places[one[0]] < places[name]]
        after = [one for one in row.items() if places[one[0]] > places[name]]
        gains = {
            value: sum((one, (name, value)) in missing for one in before)
            + sum(((name, value), one) in missing for one in after)
            for value in possible
        }
        row[name] = max(possible, key=gains.__getitem__)
    return row
