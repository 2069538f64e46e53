"""The texts of a sample against what the options say, written out by hand."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.caption import all_texts, draw_text, tag_orders, texts_of
from train.data.dataset import Data, Prior
from train.data.seeds import generator
from train.data.source import Sample, Source
from train.data.words import has_words


def sample(*captions: str, source: int = 0) -> Sample:
    return Sample("a", captions, source, bytes)


def texts(*captions: str, **options: Any) -> list[str]:
    return [orders[0] for orders in texts_of(sample(*captions), Data("a", **options))]


def test_trigger_prefix_and_suffix() -> None:
    assert texts("a fox", "a fox, zelk style", "zelk style, a fox", trigger="zelk style") == [
        "zelk style, a fox",
        "a fox, zelk style",
        "zelk style, a fox",
    ]
    assert texts("a fox", prefix="photo of ", suffix=", 4k") == ["photo of a fox, 4k"]
    assert texts("a fox", trigger="sks", prefix="photo of ") == ["sks, photo of a fox"]
    assert texts("a fox", trigger="sks", prefix="photo of sks, ") == ["photo of sks, a fox"]
    assert texts("ask sksy", trigger="sks") == ["sks, ask sksy"]  # no word of its own
    assert has_words("the [v] dog", "[v]") and not has_words("the v dog", "[v]")


def test_class_pictures_keep_their_captions() -> None:
    data = Data("a", trigger="sks", prefix="photo of ", prior=Prior("dogs"))
    assert all_texts([sample("a dog"), sample("a dog", source=1)], data) == ["sks, photo of a dog", "a dog"]
    by_hand = Data(trigger="sks", sources=[Source("a"), Source("b", prior=True)])
    assert all_texts([sample("a dog"), sample("a dog", source=1)], by_hand) == ["sks, a dog", "a dog"]


@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from([None, "a", "x"]),
)
def test_tag_orders(tags: list[str], orders: int, keep: int, trigger: str | None) -> None:
    data = Data("p", trigger=trigger, tag_orders=orders, keep_tags=keep if orders > 1 else 0)
    caption = ",".join(tags)
    found = tag_orders(caption, data)
    assert found[0] == caption and 1 <= len(found) <= orders and len(set(found)) == len(found)
    assert found == tag_orders(caption, data)
    for text in found[1:]:
        shuffled = text.split(", ")
        assert tuple(shuffled) in set(permutations(tags))
        fixed = [i for i, tag in enumerate(tags) if i < data.keep_tags or tag == trigger]
        assert [shuffled[i] for i in fixed] == [tags[i] for i in fixed]


def test_tags_are_really_shuffled() -> None:
    found = tag_orders("a, b, c, d, e, f", Data("p", tag_orders=20, keep_tags=2))
    assert len(found) > 10 and all(text.startswith("a, b, ") for text in found)
    assert len({text.split(", ")[2] for text in found}) == 4


def test_each_text_is_listed_once() -> None:
    data = Data("p", trigger="t", caption_dropout=0.1, tag_orders=3)
    listed = all_texts([sample("x, y"), sample("x, y", "z"), sample("z")], data)
    assert set(listed) <= {"t, x, y", "t, y, x", "t, z", ""} and {"t, x, y", "t, z", ""} <= set(listed)
    assert len(listed) == len(set(listed))
    assert all_texts([sample("x")], Data("p")) == ["x"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_draws(dropout: float) -> None:
    """Every text that is drawn is listed; each caption comes as often as the others, however many orders it has."""
    one = sample("a, b, c, d", "plain")
    data = Data("p", trigger="t", caption_dropout=dropout, tag_orders=6)
    listed = all_texts([one], data)
    drawn = [draw_text(one, data, generator(0, "x", i)) for i in range(2000)]
    assert drawn == [draw_text(one, data, generator(0, "x", i)) for i in range(2000)]
    assert set(drawn) == set(listed)
    share = {text: drawn.count(text) / len(drawn) for text in listed}
    assert share.get("", 0) == pytest.approx(dropout, abs=0.04)
    assert share["t, plain"] == pytest.approx((1 - dropout) / 2, abs=0.04)
    others = [value for text, value in share.items() if text not in ("", "t, plain")]
    assert len(others) > 3 and others == pytest.approx([(1 - dropout) / 2 / len(others)] * len(others), abs=0.04)
