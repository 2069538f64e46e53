"""Rows -> one summary for each (precision, adapter): means with intervals over prompts and seeds, and paired
differences.
"""

from collections.abc import Sequence

from infer.report.means import by_variant, summarise
from infer.report.results import Estimate, Row, Summary, Variant
from infer.score.bootstrap import Unit, difference, interval
from infer.score.memorization import SetScore

CHANGES = ("psnr", "ssim", "latents", "lpips")


def summarise_scores(
    rows: Sequence[Row],
    elsewhere: dict[str, Sequence[Row]],
    sets: Sequence[SetScore],
    reference: str | None,
    own: Sequence[str] = (),
) -> list[Summary]:
    """What `infer.report.means.summarise` gives, and in each summary

    - `intervals`: of each score its 95 % limits, where there are two pictures or more;
    - `differences`: to the `reference` precision with the same adapter, and to `base`, the same precision without the
      adapter: of each score the mean of the differences at the same prompt and seed, with its limits;
    - among the scores `drift_...` and `bleed_...`: what the adapter changes on unrelated prompts, and on prompts of its
      class (the rows of `elsewhere`, by these names). Of the user's scores (`own`) it is the mean difference to the
      picture without the adapter;
    - the distances of whole sets (`sets`).
    """
    groups = by_variant(rows)
    moved = {kind: by_variant(rows) for kind, rows in elsewhere.items()}
    summary = summarise(rows)
    for entry in summary:
        group = groups[entry.variant]
        for score in list(entry.scores):
            _add(entry, score, _mean(group, score))
        others: dict[str, Variant] = {"base": (entry.precision, None)} if entry.adapter else {}
        if reference is not None and entry.precision != reference:
            others[reference] = reference, entry.adapter
        entry.differences = {name: _differences(group, groups[other]) for name, other in others.items()}
        for kind, variants in moved.items() if entry.adapter else ():
            adapted, base = variants.get(entry.variant, ()), variants.get((entry.precision, None), ())
            for score in CHANGES:
                _add(entry, f"{kind}_{score}", _mean(adapted, f"{score}_base"))
            for score in own:
                _add(entry, f"{kind}_{score}", _differences(adapted, base).get(score))
        for one in sets:
            if one.variant == entry.variant:
                _add(entry, one.name, one.distance)
    return summary


def _unit(row: Row) -> Unit:
    return row.asked, row.seed


def _mean(rows: Sequence[Row], score: str) -> Estimate | None:
    return interval([row.scores.get(score) for row in rows], [_unit(row) for row in rows])


def _add(entry: Summary, score: str, found: Estimate | None) -> None:
    entry.intervals = entry.intervals or {}
    if found is None:
        return
    entry.scores[score] = found.mean
    if found.low is not None and found.high is not None:
        entry.intervals[score] = [found.low, found.high]


def _differences(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Estimate]:
    found = {}
    for score in dict.fromkeys(score for row in rows for score in row.scores):
        values, other_values = ({_unit(row): row.scores.get(score) for row in group} for group in (rows, others))
        paired = difference(values, other_values)
        if paired is not None:
            found[score] = paired
    return found
