"""A drawn picture as a report's row, of which only the scores are asked."""

from infer.report.curves import STAGES
from infer.report.results import Row, Stage


def drawn_row(precision: str, adapter: str | None, prompt: str, seed: int, image: str, seconds: float = 0.0) -> Row:
    """image: its file, relative to the folder of the pictures."""
    return Row(
        precision=precision,
        adapter=adapter,
        prompt=prompt,
        seed=seed,
        image=image,
        seconds=seconds,
        seconds_per_step=0.0,
        weights_bytes=0,
        peak_memory_bytes=0,
        scores={},
        stages={stage: Stage(0.0, 0) for stage in STAGES},
    )
