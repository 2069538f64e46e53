"""Output preservation: what the base itself predicts for the class's texts is a second target beside the pictures.

    train/train.py data.path=my_dog data.trigger=sks preserve=class preserve.word=dog

For the same noised picture the adapter is asked for a text without the trigger, and learns to answer what the base does
without the adapter (ai-toolkit's differential output preservation and blank prompt preservation; the same idea is
learning without forgetting, Li and Hoiem 2016). No pictures are needed for it, unlike for prior preservation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from infer.program.bounds import check_most
from infer.program.no_effect import refuse_idle
from train.data.words import as_words, has_words

KINDS = ("none", "class", "empty")


@dataclass
class Preserve:
    """Output preservation: which texts are to look as they do without the adapter."""

    kind: str = "none"
    """none; class: each caption with the class word in place of the trigger; empty: the empty caption."""
    word: str = ""
    """The class word of `class`, as dog for the trigger sks; where a caption holds it already (sks dog), and where it
    is empty, the trigger is left out."""
    weight: float = 1.0
    """What the distance from the base's prediction counts beside the distance from the picture."""

    def __post_init__(self) -> None:
        check_most(self, "preserve.", weight=10**6)
        self.word = self.word.strip()
        if self.kind not in KINDS:
            raise ValueError(f"preserve.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"preserve.weight is {self.weight}; it must be above 0 (preserve=none preserves nothing)")
        if self.kind != "class":
            refuse_idle(self, "preserve.", ("word",), f"preserve.kind={self.kind} puts no word into a caption")
        if self.kind == "none":
            refuse_idle(self, "preserve.", ("weight",), "preserve.kind=none preserves nothing")


def preserved_text(text: str, preserve: Preserve, trigger: str | None) -> str:
    """The text that is preserved while `text` is learned."""
    if preserve.kind == "empty":
        return ""
    assert preserve.kind == "class" and trigger, "check_preserved has been called"
    pattern = as_words(trigger)
    bare = re.sub(r"\s+", " ", re.sub(rf"{pattern}\s*,?", "", text)).strip(" ,")
    if not preserve.word or has_words(bare, preserve.word):
        return bare
    return re.sub(pattern, lambda _: preserve.word, text)


def check_preserved(preserve: Preserve, trigger: str | None, captions: Iterable[str]) -> None:
    """Compare the settings with the captions of all but class pictures, with prefix and suffix and without the trigger.

    Raises:
        ValueError: there is no trigger, or the class word is in no caption and the trigger, whose place it would take,
            is not either.
    """
    if preserve.kind != "class":
        return
    if not trigger:
        raise ValueError(
            "preserve.kind is class, but data.trigger is null; set the trigger, or preserve=empty, which needs none"
        )
    captions = list(captions)
    if not preserve.word or has_words(trigger, preserve.word):
        return
    if not any(has_words(text, word) for text in captions for word in (preserve.word, trigger)):
        raise ValueError(
            f"preserve.word is {preserve.word!r}, which no caption holds, as in {captions[0]!r}; name a word that they "
            f"hold, or write the trigger into them, as in '{trigger} {preserve.word}', or set preserve.word= (the "
            "trigger is left out)"
        )
