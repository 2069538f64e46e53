"""Words within a caption: what a trigger or a class word is."""

import re


def as_words(words: str) -> str:
    """The pattern of these as words of their own."""
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def has_words(text: str, words: str) -> bool:
    """Whether a text holds these as words of its own."""
    return re.search(as_words(words), text) is not None
