"""A sample's captions -> the texts that it is trained with.

Trigger, prefix, suffix and orders of tags make a small number of texts of each caption, so that each is encoded once;
which of them a sample gets is drawn for its position in the epoch.
"""

from collections.abc import Iterable

import torch

from train.data.dataset import Data, sources_of
from train.data.seeds import generator
from train.data.source import Sample
from train.data.words import has_words


def texts_of(sample: Sample, data: Data) -> list[list[str]]:
    """Every text of a sample: one list a caption, of its orders of tags, as written first."""
    prior = sources_of(data)[sample.source].prior
    return [
        [order if prior else dressed(order, data) for order in tag_orders(caption, data)] for caption in sample.captions
    ]


def all_texts(samples: Iterable[Sample], data: Data) -> list[str]:
    """Every distinct text of all samples, and the empty one if captions are dropped."""
    texts = [text for sample in samples for orders in texts_of(sample, data) for text in orders]
    return list(dict.fromkeys([*texts, *([""] if data.caption_dropout > 0 else [])]))


def draw_text(sample: Sample, data: Data, numbers: torch.Generator) -> str:
    """A text of a sample, drawn by `numbers`: none at all, or any of its captions, in any of its orders."""
    dropped, caption, order = torch.rand(3, generator=numbers, dtype=torch.float64).tolist()
    if dropped < data.caption_dropout:
        return ""
    texts = texts_of(sample, data)
    orders = texts[int(caption * len(texts))]
    return orders[int(order * len(orders))]


def dressed(caption: str, data: Data) -> str:
    """A caption with prefix and suffix, and the trigger in front where it is not there yet."""
    text = f"{data.prefix}{caption}{data.suffix}"
    return text if not data.trigger or has_words(text, data.trigger) else f"{data.trigger}, {text}"


def tag_orders(caption: str, data: Data) -> list[str]:
    """A caption as written and up to tag_orders - 1 shuffles of its tags: the same ones in every run.

    The first keep_tags stay in place, and so does a tag that is the trigger.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    free = [i for i, tag in enumerate(tags) if i >= data.keep_tags and tag != data.trigger]
    texts = {caption: None}
    for k in range(1, data.tag_orders):
        shuffled = list(tags)
        for i, j in zip(free, torch.randperm(len(free), generator=generator(k, "tags", caption)).tolist(), strict=True):
            shuffled[i] = tags[free[j]]
        texts[", ".join(shuffled)] = None
    return list(texts)
