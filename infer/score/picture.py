"""A drawn picture that is scored and not reported: without what it cost."""

from dataclasses import dataclass, field

from infer.report.results import Scores, Variant


@dataclass
class Picture:
    """A picture to be scored."""

    precision: str
    adapter: str | None
    """Its name, or a checkpoint with its strength; None is the base."""
    prompt: str
    seed: int
    image: str
    scores: Scores = field(default_factory=dict)
    nearest: str | None = None

    @property
    def variant(self) -> Variant:
        return self.precision, self.adapter

    @property
    def asked(self) -> str:
        return self.prompt
