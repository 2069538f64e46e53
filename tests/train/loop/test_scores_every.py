"""scores_every: likeness, copying and drift during training, and runs that end by them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infer.adapter.attach import attach
from infer.adapter.attached import set_adapter_state
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE, read_notes
from infer.adapter.switch import without_adapter
from infer.checkpoint.load import load_scheduler, load_transformer
from infer.checkpoint.model import Model
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw, settled
from infer.score.judges import Networks
from infer.score.picture import Picture
from train.data.dataset import Data
from train.loop.scores import summary
from train.objective.optim import Optim
from train.run.config import Train
from train.run.early_stop import EarlyStop, why_stop
from train.run.names import check_names
from train.train import train

SIDE, CPU = 32, torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "pictures").mkdir()
    for i in range(4):
        Image.radial_gradient("L").resize((SIDE, SIDE)).rotate(20 * i).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"a grey ring {i}")
    return folder


@pytest.fixture
def job(place: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(place)
    return Train(
        model=Model(str(ROOT / "scripts/tiny/model")), precision=Precision("nf4"), adapter=Adapter(rank=4),
        data=Data("pictures", SIDE, validation=0.25), steps=4, validate_every=0, validation_levels=1, save_every=2,
        keep=9, previews=["a grey ring"], unrelated=["a red star"], scores_every=2, device="cpu",
        sampling=Sampling(1, height=SIDE, width=SIDE), optim=Optim(lr=0.02, warmup=0), run="scored",
    )  # fmt: skip


def lines_of(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def test_drift_is_that_of_the_checkpoint_drawn_again(
    job: Train, loss_picture: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the checkpoint's adapter in a transformer of its own."""
    train(job)
    scored = {line["step"]: line for line in lines_of("scored") if "score_drift" in line}
    assert list(scored) == [2, 4] and {"score_change", "score_copying", "score_nearest"} <= scored[2].keys()
    assert "score_likeness" not in scored[2]  # no network is there
    losses = {line["step"] for line in lines_of("scored") if "validation_loss" in line}
    assert losses == {0, 2, 4}  # each scoring is a validation
    transformer = load_transformer(job.model, job.precision, CPU).eval()
    attach(transformer, job.adapter, 0)
    with text_encoder(job.model, job.precision, CPU, None) as encoder:
        texts = dict(zip(("score_change", "score_drift"), encoder(["a grey ring", "a red star"]), strict=True))
    for step, found in scored.items():
        state = load_file(Path(f"runs/scored/checkpoints/step-{step:06d}/adapter.safetensors"))
        set_adapter_state(transformer, state)
        for name, text in texts.items():
            how = text, job.seed, settled(job.sampling, job.model), (SIDE, SIDE), CPU
            with without_adapter(transformer):
                base = draw(transformer, load_scheduler(job.model), *how).double()
            moved = draw(transformer, load_scheduler(job.model), *how).double()
            expected = float(((moved - base).square().sum() / base.square().sum()).sqrt())
            assert found[name] == pytest.approx(expected, rel=0.02)
    pictures = sorted(path.name for path in Path("runs/scored/scores/step-000004").glob("*.png"))
    assert pictures == ["00-base.png", "00.png", "01-base.png", "01.png"]
    assert Path("runs/scored/scores.png").is_file()
    said = capfd.readouterr().out
    assert "change first: " in said or "then: " in said or scored[4]["score_drift"] <= 0.5 * scored[4]["score_change"]
    again = json.loads(Path("runs/scored/checkpoints/step-000004/state.json").read_text())["state"]
    assert json.loads(again)["scores"].keys() == {"2"}  # what is due at a checkpoint's step comes after it


def test_a_run_ends_by_its_drift_and_goes_on_without_that(job: Train, capfd: pytest.CaptureFixture[str]) -> None:
    early = replace(job, run="early", stop=EarlyStop(drift=1e-6))
    adapter = train(early)
    said = capfd.readouterr().out
    assert "ended at step 2 of 4: unrelated prompts are moved by" in said
    notes = read_notes(adapter / FILE)
    assert notes["step"] == 2 and notes["asked"] == 4
    train(early)
    assert "run 'early' is finished" in capfd.readouterr().out
    train(replace(job, run="early"))
    assert read_notes(adapter / FILE)["step"] == 4
    whole = train(replace(job, run="whole", scores_every=0, unrelated=Train().unrelated, previews=[]))
    a, b = (load_file(folder / FILE) for folder in (adapter, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)  # as one that never ended


def test_a_run_ends_by_its_validation_loss(job: Train, capfd: pytest.CaptureFixture[str]) -> None:
    """At a rate that ruins it."""
    ruined = replace(
        job, run="ruined", scores_every=0, unrelated=Train().unrelated, validate_every=1, steps=9,
        optim=Optim(lr=0.3, warmup=0), stop=EarlyStop(loss=2),
    )  # fmt: skip
    train(ruined)
    losses = [line["validation_loss"] for line in lines_of("ruined") if "validation_loss" in line]
    best = int(np.argmin(losses))
    assert len(losses) - 1 - best == 2 and len(losses) < 10
    assert f"2 validations since the lowest loss of the held-out pictures ({losses[best]:.4f}" in capfd.readouterr().out


def test_what_ends_a_run() -> None:
    falling = {str(step): 1 / (step + 1) for step in range(5)}
    assert why_stop(EarlyStop(loss=1), falling, {}) is None
    assert "at step 1)" in str(why_stop(EarlyStop(loss=2), {"0": 3.0, "1": 1.0, "2": 1.0, "10": 2.0}, {}))
    liked = {"5": {"likeness": 0.5}, "10": {"likeness": 0.4}}
    assert "0.500 at step 5" in str(why_stop(EarlyStop(likeness=1), {}, liked))
    assert why_stop(EarlyStop(likeness=2), {}, liked) is None
    copied = {"5": {"copying": 0.5, "drift": 0.2}}
    assert "50 %" in str(why_stop(EarlyStop(copying=0.5), {}, copied))
    assert why_stop(EarlyStop(copying=0.6, drift=0.3), {}, copied) is None
    assert "0.200" in str(why_stop(EarlyStop(drift=0.2), {}, copied))


def test_the_figures_are_means_over_pictures_with_the_adapter() -> None:
    rows: list[Picture] = []
    for i, (adapter, nearest, moved, liked) in enumerate(
        ((None, 0.1, None, 0.9), ("adapter", 0.4, 0.2, 0.5), ("adapter", 1.2, 0.4, 0.7))
    ):
        rows.append(Picture("nf4", adapter, f"prompt {i}", 0, "x.png"))
        rows[-1].scores.update(nearest_rms=nearest, latents_base=moved, dino=liked)
    found = summary(rows, rows[:2], 1.0)
    assert found == pytest.approx({"likeness": 0.6, "copying": 0.5, "nearest": 0.4, "change": 0.3, "drift": 0.2})
    assert "copying" not in summary(rows, [], None)  # one training picture alone says nothing of what is usual


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores_every": 0}, r"unrelated is \['a red star'\], which has no effect: scores_every is 0"),
        ({"scores_every": 0, "unrelated": Train().unrelated, "stop": EarlyStop(drift=0.2)}, "stop.drift is 0.2, which"),
        (
            {"scores_every": 0, "unrelated": Train().unrelated, "networks": Networks(dino="a/b")},
            "networks.dino is a/b, which has no effect: scores_every is 0",
        ),
        ({"scores_every": -1}, "scores_every is -1; it must be 0"),
        ({"previews": []}, r"previews=\[\] leaves no prompts to draw"),
        ({"stop": EarlyStop(likeness=2)}, "stop.likeness is 2, and no network judges likeness; set networks=hub"),
        ({"networks": Networks(lpips="x")}, "networks.lpips is x, which has no effect"),
        ({"unrelated": [], "stop": EarlyStop(drift=1.0)}, r"stop.drift is 1, and unrelated is \[\]"),
        ({"data": Data("pictures", SIDE, validation=0), "stop": EarlyStop(loss=1)}, "data.validation=0 holds no pictu"),
        ({"networks": Networks(dino="no/such/place/here")}, "networks.dino is .*no folder here and no Hub id"),
        ({"data": Data("s3://bucket/a", SIDE), "stop": EarlyStop(copying=0.5)}, "stop.copying is set, and drawn"),
    ],
)
def test_what_cannot_be_scored_is_refused(job: Train, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_names(replace(job, **changes))  # type: ignore[arg-type]


def test_an_early_stop_needs_validations(job: Train) -> None:
    with pytest.raises(ValueError, match="validate_every=0 validates at the end alone"):
        replace(job, scores_every=0, unrelated=Train().unrelated, validate_every=0, stop=EarlyStop(loss=2))


def test_limits_of_early_stops() -> None:
    for changes, said in (({"loss": -1}, "stop.loss is -1"), ({"drift": 0.0}, "stop.drift is 0.0; it must be above 0")):
        with pytest.raises(ValueError, match=said):
            EarlyStop(**changes)  # type: ignore[arg-type]
