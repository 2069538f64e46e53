"""What of a picture is asked to score it: a row of a comparison is one, and so is whatever else holds these."""

from typing import Protocol

from infer.report.results import Scores, Variant


class Drawn(Protocol):
    """A drawn picture, with the scores that are filled in."""

    precision: str
    adapter: str | None
    prompt: str
    seed: int
    image: str
    """Its file, relative to a folder."""
    scores: Scores
    nearest: str | None
    """The nearest training picture, relative to their folder."""

    @property
    def variant(self) -> Variant: ...

    @property
    def asked(self) -> str:
        """Its prompt with the references, which tells it from the same prompt with others."""
        ...
