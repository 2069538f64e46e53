"""Rows -> one entry a (precision, adapter): means with intervals over prompts and seeds, and paired differences."""

from typing import Any

from infer.report import write as report
from infer.score.bootstrap import Interval, Place, difference, interval
from infer.score.pairs import Row

DRIFT = ("psnr", "ssim", "latents", "lpips")


def summarise(rows: list[Row], drift: list[Row], sets: list[Row], reference: str | None) -> list[Row]:
    """What `report.summarise` gives, and in each entry

    - `intervals`: of each score its 95 % limits, where there are two pictures or more;
    - `differences`: to the `reference` precision with the same adapter, and to `base`, the same precision without the
      adapter: of each score the mean of the differences at the same prompt and seed, with its limits;
    - among the scores `drift_...`: what the adapter changes on prompts that it has nothing to do with (the rows of
      `drift`), and the measures of whole sets (`sets`).
    """
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["adapter"]), []).append(row)
    entries = report.summarise(rows)
    for entry in entries:
        own = groups[entry["precision"], entry["adapter"]]
        entry["intervals"] = {}
        for score in entry["scores"]:
            _put(entry, score, interval([r["scores"].get(score) for r in own], [_place(r) for r in own]))
        entry["differences"] = {}
        others = {"base": (entry["precision"], None)} if entry["adapter"] else {}
        if reference is not None and entry["precision"] != reference:
            others[reference] = reference, entry["adapter"]
        for name, other in others.items():
            entry["differences"][name] = _differences(own, groups[other])
        drifted = [r for r in drift if r["adapter"] and _group(r) == _group(entry)]
        for score in DRIFT:
            values = [r["scores"].get(f"{score}_base") for r in drifted]
            _put(entry, f"drift_{score}", interval(values, [_place(r) for r in drifted]))
        for one in sets:
            if _group(one) == _group(entry):
                _put(entry, one["score"], Interval(one["mean"], one["low"], one["high"], one["pictures"]))
    return entries


def _group(row: Row) -> tuple[str, str | None]:
    return row["precision"], row["adapter"]


def _place(row: Row) -> Place:
    return row["prompt"], row["seed"]


def _put(entry: Row, score: str, found: Interval | None) -> None:
    if found is None:
        return
    entry["scores"][score] = found.mean
    if found.low is not None:
        entry["intervals"][score] = [found.low, found.high]


def _differences(own: list[Row], others: list[Row]) -> dict[str, Any]:
    found = {}
    for score in dict.fromkeys(score for row in own for score in row["scores"]):
        values, theirs = ({_place(row): row["scores"].get(score) for row in group} for group in (own, others))
        paired = difference(values, theirs)
        if paired is not None:
            found[score] = paired._asdict()
    return found
