"""The notes at a run's end: what to change first."""

import re
from pathlib import Path

import pytest

from infer.adapter.lora import Adapter
from train.loop.next_steps import next_steps, what_to_change_first
from train.objective.preservation import Preserve
from train.run.config import Train


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, 0.5, 0.4], None),
        ([1.0, 0.4, 0.405], None),
        ([1.0, 0.4, 0.5], "lowest at step 1 (0.4000) and rose to 0.5000"),
        ([1.0, 1.2], "lowest at step 0"),
        ([1.0, 0.995], "fell by 0.5 % alone"),
        ([1.0, 1.0001], "the validation loss did not fall: look at the previews"),
        ([1.0], None),
        ([], None),
    ],
)
def test_the_note_follows_the_validation_losses(losses: list[float], said: str | None) -> None:
    job = Train()
    found = what_to_change_first(job, {str(step): loss for step, loss in enumerate(losses)}, {})
    assert found == [] if said is None else len(found) == 1 and said in found[0]
    if said and "alone" in said:
        assert f"optim.lr={3 * job.optim.lr:g}" in found[0] and "a higher adapter.rank" in found[0]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"change": 0.4, "drift": 0.1, "copying": 0.0}, []),
        ({"change": 0.4, "drift": 0.1, "copying": 0.5}, ["change first: 50 % of the drawn pictures .* set steps=100"]),
        ({"change": 0.4, "drift": 0.3}, ["change first: unrelated prompts are moved by 0.300, .*set preserve=empty"]),
        ({"change": 0.02, "drift": 0.0}, ["change first: pictures are moved by 0.020 of their latents alone"]),
        (
            {"change": 0.4, "drift": 0.3, "copying": 1.0},
            ["change first: 100 % of the drawn pictures", "then: unrelated prompts are moved"],
        ),
    ],
)
def test_the_notes_follow_the_scores(last: dict[str, float], said: list[str]) -> None:
    scores = {"100": {"change": 0.3, "drift": 0.0, "copying": 0.0}, "200": last}
    found = what_to_change_first(Train(), {"0": 1.0, "200": 0.5}, scores)
    assert len(found) == len(said)
    for line, pattern in zip(found, said, strict=True):
        assert re.match(pattern, line), line


def test_a_preserving_run_that_drifts_is_not_told_to_preserve() -> None:
    job = Train(preserve=Preserve("empty"))
    (line,) = what_to_change_first(job, {}, {"9": {"change": 0.4, "drift": 0.4}})
    assert "set a lower optim.lr" in line


@pytest.mark.parametrize(
    ("kind", "said", "absent"),
    [
        ("lora", "to=comfyui", "merge.py"),
        ("lokr", "to=diffusers out=mine-lora.safetensors", "load_lora_weights"),
        ("oft", "infer/merge.py model=tiny ", "ComfyUI"),
    ],
)
def test_what_comes_next_is_what_the_kind_can_do(kind: str, said: str, absent: str) -> None:
    text = next_steps(Train(adapter=Adapter(kind=kind), run="mine"), Path("runs/mine"), ["a fox"])
    assert said in text and absent not in text
