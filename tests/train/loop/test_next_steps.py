"""The note at a run's end: what to change first."""

import pytest

from train.loop.next_steps import what_to_change_first
from train.run.config import Train


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, 0.5, 0.4], None),
        ([1.0, 0.4, 0.405], None),
        ([1.0, 0.4, 0.5], "lowest at step 1 (0.4000) and rose to 0.5000"),
        ([1.0, 1.2], "lowest at step 0"),
        ([1.0, 0.995], "fell by 0.5 % alone"),
        ([1.0], None),
        ([], None),
    ],
)
def test_the_note_follows_the_validation_losses(losses: list[float], said: str | None) -> None:
    job = Train()
    found = what_to_change_first(job, {str(step): loss for step, loss in enumerate(losses)})
    assert found is None if said is None else found is not None and said in found
    if said and "alone" in said:
        assert f"optim.lr={3 * job.optim.lr:g}" in str(found)
