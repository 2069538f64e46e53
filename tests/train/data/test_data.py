"""What is held out, what is left after skipping, and which sources there are."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.dataset import Data, Prior, sources_of
from train.data.samples import check_left
from train.data.source import Sample, Skipped, Source
from train.data.split import split


@given(st.sets(st.text(), min_size=2, max_size=40), st.floats(0.001, 0.999), st.integers(0, 9), st.randoms())
def test_split(keys: set[str], share: float, seed: int, shuffler: random.Random) -> None:
    there = sorted(keys)
    train, held = split(there, share, seed)
    assert sorted(train + held) == list(range(len(keys)))  # disjoint, and all
    assert train and held and abs(len(held) - share * len(keys)) <= 1
    moved = there.copy()
    shuffler.shuffle(moved)
    assert {moved[i] for i in split(moved, share, seed)[1]} == {there[i] for i in held}
    assert split(there, 0, seed) == (list(range(len(keys))), [])


def test_split_depends_on_the_seed() -> None:
    keys = [str(i) for i in range(50)]
    assert len({tuple(split(keys, 0.1, seed)[1]) for seed in range(5)}) > 1


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.001, 0.999), st.integers(0, 9))
def test_duplicates_are_never_on_both_sides(kinds: list[int], share: float, seed: int) -> None:
    keys = [str(kind) for kind in kinds]
    if len(set(keys)) == 1:
        with pytest.raises(ValueError, match=f"all {len(keys)} pictures are the same.*data.validation=0"):
            split(keys, share, seed)
        return
    train, held = split(keys, share, seed)
    assert sorted(train + held) == list(range(len(keys))) and train and held
    assert not {keys[i] for i in train} & {keys[i] for i in held}
    # never more than the share, unless even the smallest group is
    assert len(held) <= max(1, round(share * len(keys)), min(keys.count(key) for key in keys))


def sample(source: int = 0) -> Sample:
    return Sample("a", ("a",), source, bytes)


def test_sources() -> None:
    assert sources_of(Data("a", masks="m")) == [Source("a", "m")]
    two = [Source("a", repeats=2), Source("b", weight=0.5)]
    assert sources_of(Data(sources=two)) == two
    prior = sources_of(Data("a", prior=Prior("dogs", "a dog", weight=0.3)))
    assert prior == [Source("a"), Source("dogs", caption="a dog", weight=0.3, prior=True)]
    drawn = sources_of(Data(sources=two, prior=Prior(prompt="a dog", count=7)))
    assert drawn[:2] == two and drawn[2].prior and "7 pictures" in drawn[2].path and len(drawn) == 3


@pytest.mark.parametrize(
    "kept, skipped, options, message",
    [
        (0, 0, {}, r"nothing is left to train on \(0 skipped\)"),
        (0, 3, {}, r"nothing is left to train on \(3 skipped; the first: s0 is broken\)"),
        (4, 5, {}, r"5 of 9 samples are skipped, and data.least=0.5.*; the first: s0 is broken"),
        (5, 5, {}, None),
        (4, 5, {"least": 0.4, "on_error": "skip"}, None),
        (4, 5, {"least": 0.9, "on_error": "skip"}, "data.least=0.9"),
        (1, 0, {}, "there are 1 pictures, too few to hold one out; set data.validation=0"),
        (1, 0, {"validation": 0}, None),
    ],
)
def test_too_little_is_refused(kept: int, skipped: int, options: dict[str, Any], message: str | None) -> None:
    arguments = Data("a", **options), [sample()] * kept, [Skipped(f"s{i}", "is broken") for i in range(skipped)]
    if message is None:
        check_left(*arguments)
    else:
        with pytest.raises(ValueError, match=message):
            check_left(*arguments)


def test_class_pictures_alone_are_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="nothing is left to train on"):
        check_left(Data("a", prior=Prior("dogs")), [sample(1)] * 9, [])
