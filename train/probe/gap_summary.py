"""What a gap measured: rows, their means over pictures with limits, and the table of these."""

from collections.abc import Sequence
from dataclasses import dataclass

from infer.report.results import Estimate, Variant
from infer.score.bootstrap import interval


@dataclass(frozen=True)
class GapRow:
    """One picture at one noise level, at one precision with one adapter or none."""

    precision: str
    adapter: str | None
    picture: str
    level: int
    sigma: float
    loss: float
    """The flow-matching objective, unweighted."""
    error: float
    """The velocity's relative error against the first precision's with the same adapter."""
    transformer_bytes: int

    @property
    def variant(self) -> Variant:
        return self.precision, self.adapter


@dataclass(frozen=True)
class GapSummary:
    """Means over the pictures of one (precision, adapter)."""

    precision: str
    adapter: str | None
    level: int | None
    """None: all levels together; so is sigma."""
    sigma: float | None
    transformer_bytes: int
    error: Estimate
    loss: Estimate
    cost: Estimate
    """The loss above the first precision's with the same adapter, paired by picture and noise."""

    @property
    def variant(self) -> Variant:
        return self.precision, self.adapter


def summarise(rows: Sequence[GapRow]) -> list[GapSummary]:
    """For each precision and adapter: all levels together, then each level. Limits are over pictures."""
    groups: dict[Variant, list[GapRow]] = {}
    for row in rows:
        groups.setdefault(row.variant, []).append(row)
    first = rows[0].precision
    found = []
    for (precision, adapter), group in groups.items():
        for level in (None, *sorted({row.level for row in group})):
            chosen = [row for row in group if level in (None, row.level)]
            compared = [row for row in groups[first, adapter] if level in (None, row.level)]
            found.append(
                GapSummary(
                    precision=precision,
                    adapter=adapter,
                    level=level,
                    sigma=None if level is None else chosen[0].sigma,
                    transformer_bytes=group[0].transformer_bytes,
                    error=_over_pictures(chosen, [row.error for row in chosen]),
                    loss=_over_pictures(chosen, [row.loss for row in chosen]),
                    cost=_over_pictures(
                        chosen, [row.loss - other.loss for row, other in zip(chosen, compared, strict=True)]
                    ),
                )
            )
    return found


def _over_pictures(rows: Sequence[GapRow], values: Sequence[float]) -> Estimate:
    found = interval(values, [(row.picture, "") for row in rows])
    assert found is not None
    return found


def table(summary: Sequence[GapSummary]) -> list[list[str]]:
    """Titles and cells: all levels together, then one column for each level with the velocity's error in percent."""
    sigmas = list(dict.fromkeys(entry.sigma for entry in summary if entry.level is not None))
    lines = [["precision", "adapter", "MiB", "error %", "loss", "cost", *(f"% at {sigma:.3f}" for sigma in sigmas)]]
    for entry in summary:
        if entry.level is not None:
            continue
        levels = [other for other in summary if other.variant == entry.variant and other.level is not None]
        lines.append(
            [
                entry.precision,
                entry.adapter or "none",
                f"{entry.transformer_bytes / 2**20:,.2f}",
                _text(entry.error, 100, 2),
                _text(entry.loss),
                _text(entry.cost),
                *(_text(other.error, 100, 2) for other in levels),
            ]
        )
    return lines


def _text(found: Estimate, scale: float = 1.0, digits: int = 4) -> str:
    mean = f"{scale * found.mean:.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"
