"""A survey as JSON, for programs that show it: train/page.py does, without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from train.data.dataset import Data, sources_of

if TYPE_CHECKING:
    from train.survey.survey import Survey

NAME = "data.json"
LAYOUT = 1


def record(found: Survey, data: Data, refusal: str | None, numbers: dict[str, Any]) -> dict[str, Any]:
    """Every picture with its views, what was noted of it, duplicates, buckets and what is left out.

    refusal: why training could not start; numbers: the survey's counts.
    """
    names = [sample.name for sample in found.samples]
    pictures = []
    for index in found.usable:
        picture = found.pictures[index]
        assert picture is not None
        views = [
            asdict(view) | {"resolution": resolution}
            for resolution, of_one in zip(data.resolutions, picture.views, strict=True)
            for view in of_one
        ]
        pictures.append(
            {
                "name": names[index],
                "size": [picture.width, picture.height],
                "views": views,
                "cut": max((fit.cut for fit in found.fits[index]), default=0.0),
                "notes": list(found.notes.get(index, ())),
            }
        )
    buckets = [
        {"resolution": resolution, "width": width, "height": height, "count": len(fits)}
        | {"cut": sum(fit.cut for fit in fits) / len(fits)}
        for (resolution, width, height), fits in found.buckets().items()
    ]
    return {
        "layout": LAYOUT,
        "data": [source.path for source in sources_of(data)],
        "refusal": refusal,
        "counts": numbers,
        "pictures": pictures,
        "buckets": buckets,
        "copies": [[names[i] for i in group] for group in found.copies],
        "near": [[names[i] for i in group] for group in found.near.groups],
        "skipped": [{"name": each.name, "reason": each.reason} for each in found.skipped],
    }
