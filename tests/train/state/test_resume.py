"""Stopped, killed, crowded, on a full disk, on other ranks, or with losses that are not finite: a run ends as one to
which nothing happened, or says why not."""

import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.checkpoint.model import Model
from infer.program.errors import DIFFERS, MEND, STOPPED
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts.tiny.make_style import make_style
from tests.forked import Forked, ranks
from train.data.dataset import Data
from train.loop.validation import Validation
from train.objective.ema import Average
from train.objective.optim import Optim
from train.run.config import Train
from train.selfcheck import check, differences, lines, state_of
from train.state import checkpoint
from train.state.checkpoint import Checkpoint, read_checkpoint
from train.state.run_lock import NAME, lock_run
from train.state.steps import list_checkpoints
from train.train import train

FIT, STEP = (importlib.import_module(f"train.loop.{name}") for name in ("fit", "step"))
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all runs of this file are, so that they share a cache."""
    folder = tmp_path_factory.mktemp("resume")
    make_style(folder / "pictures", 9, seed=2)
    return folder


@pytest.fixture
def job(place: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(place)
    return Train(
        model=Model(str(ROOT / "scripts/tiny/model")),
        precision=Precision("nf4"),
        adapter=Adapter(rank=4, dropout=0.1),
        data=Data("pictures", 64, 2, "zelk style", 0.2, caption_dropout=0.2, cache="cache"),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=2),
        steps=STEPS,
        accumulation=2,
        save_every=2,
        keep=9,
        validate_every=2,
        validation_levels=1,
        ema=0.7,
        previews=[],
        device="cpu",
    )


def as_options(job: Train) -> list[str]:
    """The job for a command line."""
    return [
        f"precision={job.precision.kind}", "adapter.rank=4", f"adapter.dropout={job.adapter.dropout}",
        "data.path=pictures", "data.resolution=64", f"data.batch_size={job.data.batch_size}",
        "data.trigger=zelk style", "data.validation=0.2",
        "data.caption_dropout=0.2", "data.cache=cache", "optim.lr=1e-3", "optim.schedule=cosine", "optim.warmup=2",
        f"steps={job.steps}", f"accumulation={job.accumulation}", f"save_every={job.save_every}", "keep=9",
        "validate_every=2", "validation_levels=1", "ema=0.7", "previews=[]", "device=cpu",
        f"run={job.run}",
    ]  # fmt: skip


@pytest.fixture
def whole(job: Train, place: Path) -> dict[str, Any]:
    """What the run comes to if nothing happens to it: trained once."""
    if not (place / "runs/whole/adapter").is_dir():
        train(replace(job, run="whole"))
    return ended(place / "runs/whole")


def copied(place: Path, name: str) -> Path:
    """The whole run under another name."""
    folder = place / "runs" / name
    shutil.copytree(place / "runs/whole", folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("run: whole", f"run: {name}"))
    return folder


def ended(folder: Path) -> dict[str, Any]:
    """All that a run leaves: checkpointed state, figures, events, adapters."""
    events = folder / "events.jsonl"
    adapters = {name: load_file(folder / name / FILE) for name in ("adapter", "adapter-ema")}
    return state_of(folder) | adapters | {"events": events.read_text() if events.is_file() else ""}


def state_at(folder: Path, step: int) -> list[Any]:
    return list(read_checkpoint(folder / f"checkpoints/step-{step:06d}"))


def forked(job: Train, place: Path) -> Forked:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return Forked([str(ROOT / "train/train.py"), *as_options(job)], place, environment, place / f"{job.run}.log")


def wait_for(step: int, folder: Path, process: Forked) -> None:
    while not any(line["step"] >= step for line in lines(folder)):
        assert process.poll() is None
        time.sleep(0.005)


def test_sigterm_saves_the_step_and_sigkill_loses_nothing(job: Train, place: Path, whole: dict[str, Any]) -> None:
    job, folder = replace(job, run="signals"), place / "runs/signals"
    process = forked(job, place)
    wait_for(3, folder, process)
    process.send_signal(signal.SIGTERM)
    code, out = process.finish(60)
    assert code == STOPPED, out
    assert "SIGTERM: stopping; this step is finished and saved first" in out
    assert "the same command goes on" in out and "Traceback" not in out
    step = lines(folder)[-1]["step"]
    assert 3 <= step < STEPS and list_checkpoints(folder / "checkpoints")[-1].name == f"step-{step:06d}"
    assert not (folder / "adapter").exists()

    process = forked(replace(job, save_every=1), place)
    wait_for(step + 2, folder, process)
    process.send_signal(signal.SIGKILL)
    code, out = process.finish(60)
    assert code == -signal.SIGKILL and f"resuming at step {step} of {STEPS}" in out
    assert json.loads((folder / NAME).read_text())["pid"] == process.pid
    train(job)
    assert not differences(whole, ended(folder))
    assert (folder / NAME).read_text() == ""


def test_two_ranks_stop_together_and_one_goes_on(job: Train, place: Path) -> None:
    """A signal to the second rank is enough. One process then takes both ranks' samples, as one with twice the batch
    does. With torchrun: the slow selfcheck."""
    job = replace(job, precision=Precision("fp32", compute_dtype="fp32"), adapter=Adapter(rank=4), run="ranks")
    single = replace(job, data=replace(job.data, batch_size=2), run="single")
    double = replace(job, data=replace(job.data, batch_size=1), run="double")
    train(single)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    both = ranks(2, [str(ROOT / "train/train.py"), *as_options(double)], place, environment, place / "double.log")
    wait_for(3, place / "runs/double", both[0])
    both[1].send_signal(signal.SIGTERM)
    ends = [process.finish(120) for process in both]
    assert [code for code, _ in ends] == [STOPPED] * 2, ends
    step = lines(place / "runs/double")[-1]["step"]
    assert 3 <= step < STEPS, ends
    (last,) = [path for path in list_checkpoints(place / "runs/double/checkpoints") if path.name.endswith(f"{step}")]
    train(double)
    assert read_checkpoint(last)[2]["step"] == step
    one, two = state_of(place / "runs/single"), state_of(place / "runs/double")
    moved = sum(float(value.square().sum()) for key, value in one["adapter"].items() if "lora_B" in key) ** 0.5
    apart = sum(float((value - two["adapter"][key]).square().sum()) for key, value in one["adapter"].items()) ** 0.5
    assert moved > 0 and apart < 1e-3 * moved
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        for name in ("validation_loss_by_level", "validation_loss_ema_by_level"):
            assert a.pop(name, []) == pytest.approx(b.pop(name, []), rel=1e-3)
        assert a == pytest.approx(b, rel=1e-3)


def test_a_checkpoint_by_name(
    job: Train, place: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(place, "named")
    job = replace(job, run="named")
    with pytest.raises(
        ValueError, match=r"resume is 'step-000003', but the checkpoints in .* are: step-000002, .*choose"
    ):
        train(replace(job, resume="step-000003"))
    train(replace(job, resume="step-000004"))
    said = capsys.readouterr().out
    assert (folder / "adapter.aside" / FILE).is_file() and (folder / "adapter-ema.aside" / FILE).is_file()
    assert "resuming at step 4 of 8" in said and "step-000006.aside: the run goes on from step 4" in said
    assert not differences(whole, ended(folder))
    cloud = f"file://{place}/cloud"
    (place / "cloud").mkdir()
    shutil.move(copied(place, "back"), place / "cloud/back")
    with pytest.raises(ValueError, match=r"resume is 'step-000003', but the checkpoints in .* are: step-000002"):
        train(replace(job, run="back", mirror=cloud, resume="step-000003"))
    shutil.rmtree(place / "runs/back")  # another machine has only what is in the cloud
    train(replace(job, run="back", mirror=cloud, resume="step-000006"))
    assert "resuming at step 6 of 8" in capsys.readouterr().out
    assert not differences(whole, ended(place / "runs/back"))
    file = folder / "checkpoints/step-000002/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="step-000002 is damaged"):
        train(replace(job, resume="step-000002"))


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_is_gone_on_from(
    job: Train, place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(place, "unfused")

    def older(path: Path) -> Checkpoint:
        found = read_checkpoint(path)
        for group in found.optimizer["param_groups"]:
            assert group["fused"]
            group["fused"] = False
        return found

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_checkpoint", older)
        train(replace(job, run="unfused", resume="step-000004"))
    assert not differences(whole, ended(folder))


def test_a_checkpoint_is_read_once(
    job: Train, place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of the one that the run goes on from, and none of the others."""
    folder = copied(place, "once")
    opened: list[str] = []
    original = Path.open

    def counted(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.parent.parent == Path("runs/once/checkpoints") and "r" in mode:
            opened.append(f"{self.parent.name}/{self.name}")
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)  # read_text and read_bytes open by it
    train(replace(job, run="once", resume="step-000006"))
    names = "adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
    assert sorted(opened) == [f"step-000006/{name}" for name in names]
    assert not differences(whole, ended(folder))


def test_a_checkpoint_names_its_base_and_holds_none_of_it(
    job: Train, place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _, state = read_checkpoint(place / "runs/whole/checkpoints/step-000008")
    assert all("lora_" in key for key in [*adapter, *state["average"]])
    values = sum(tensor.numel() for tensor in adapter.values())
    stored = sum(file.stat().st_size for file in (place / "runs/whole/checkpoints/step-000008").iterdir())
    assert 4 * values * 4 < stored < 4 * values * 4 + 200_000  # weights, their average and two moments in fp32
    shutil.rmtree(copied(place, "based") / "adapter")
    monkeypatch.setattr("train.loop.begin.fingerprint", lambda *_: "f" * 64)
    monkeypatch.setattr("train.loop.load.load_transformer", None)  # it is refused before
    with pytest.raises(ValueError, match=r"another base model \(its transformer's hash was \w{12}, is ffffffffffff\)"):
        train(replace(job, run="based"))


def test_the_best_and_the_last_are_kept(job: Train, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([9.0, 9.0, 3.0, 8.0, 1.0, 7.0, 4.0, 6.0, 5.0, 5.0])  # own and averaged weights in turn
    monkeypatch.setattr(FIT, "validate", lambda *_: Validation({"validation_loss": next(figures)}, []))
    train(replace(job, run="best", save_every=3, keep=1, keep_best=2, validate_every=2))
    # averaged: step 2 8.0, 4 7.0, 6 6.0, 8 5.0; 8 is the last and among the best too
    assert [path.name for path in list_checkpoints(place / "runs/best/checkpoints")] == ["step-000006", "step-000008"]


def test_the_average_is_that_of_the_updates(job: Train, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[list[torch.Tensor]] = []
    original = Average.update

    def recorded(self: Average) -> None:
        weights.append([parameter.detach().double().clone() for parameter in self.parameters])
        original(self)
        held.append(self)

    held: list[Average] = []
    monkeypatch.setattr(Average, "update", recorded)
    train(replace(job, run="averaged", steps=5))
    mean = weights[0]
    for updates, now in enumerate(weights[1:], start=2):
        decay = min(0.7, updates / (9 + updates))
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, now, strict=True)]
    for a, b in zip(held[0].model.shadow_params, mean, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    raw, averaged = (load_file(place / f"runs/averaged/{name}/{FILE}") for name in ("adapter", "adapter-ema"))
    assert raw.keys() == averaged.keys() and not any(torch.equal(raw[key], averaged[key]) for key in raw)
    both = [line for line in lines(place / "runs/averaged") if any(key.startswith("validation") for key in line)]
    assert [line["step"] for line in both] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert both[0]["validation_loss"] == both[1]["validation_loss_ema"]
    assert both[-2]["validation_loss"] != both[-1]["validation_loss_ema"]


def test_what_is_not_finite_is_left_out_and_spikes_are_named(
    job: Train, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two micro-batches of two samples a step: one sample of step 3 is made NaN, one of step 5 large."""
    monkeypatch.setattr("train.objective.spikes.LEAST", 3)
    original, calls, killed_at = STEP.training_batch, [0], [0]
    spoil: dict[tuple[int, int], int] = {}
    named: dict[int, list[str]] = {}

    def spoiled(job: Train, cache: Any, samples: Any, places: Any, weight: float, device: Any) -> Any:
        calls[0] += 1
        if calls[0] == killed_at[0]:
            raise KeyboardInterrupt
        batch = original(job, cache, samples, places, weight, device)
        step = spoil.get(places[0][:2])
        if step is not None:
            named[step] = [samples.all[place.sample].name for place in places]
            batch.x0[0] *= math.nan if step == 3 else 300
        return batch

    seen: list[Any] = []
    monkeypatch.setattr(STEP, "training_batch", lambda *a: (seen.append(a[3]), original(*a))[1])
    train(replace(job, run="plain", steps=6))
    spoil.update({seen[5][0][:2]: 3, seen[8][0][:2]: 5})
    monkeypatch.setattr(STEP, "training_batch", spoiled)
    job = replace(job, steps=6, run="spoiled")
    train(replace(job, save_every=1))
    folder = place / "runs/spoiled"
    out = capsys.readouterr().out
    assert "1 updates were left out as not finite" in out
    figures = [line for line in lines(folder) if "lr" in line]
    assert [line.get("skipped") for line in figures] == [None, None, 1, None, None, None]
    assert "loss" not in figures[2] and len(figures) == 6
    skipped, spike = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    assert (skipped["event"], skipped["step"], spike["event"], spike["step"]) == ("skipped", 3, "spike", 5)
    assert skipped["samples"][0]["loss"] == "nan" and skipped["samples"][0]["sample"] == named[3][0]
    assert len(skipped["samples"]) == 4 and all(isinstance(one["loss"], float) for one in skipped["samples"][1:])
    assert spike["samples"][0]["sample"] == named[5][0] and spike["loss"] > spike["threshold"]
    assert spike["samples"][0]["loss"] > 100 * spike["samples"][-1]["loss"]
    dump = folder / "skipped/step-000003"
    names = ["adapter.safetensors", "batch-0-0.safetensors", "batch-1-0.safetensors", "report.json"]
    assert sorted(file.name for file in dump.iterdir()) == names
    report = json.loads((dump / "report.json").read_text())
    assert report["gradients_not_finite"] and not report["weights_not_finite"]
    assert load_file(dump / names[2])["x0"].shape == (2, 16, 8, 8)
    before, after = (state_at(folder, step) for step in (2, 3))
    # no weight, no moment and no average has moved
    assert not differences([before[0], before[1]["state"]], [after[0], after[1]["state"]])
    assert not differences(before[2]["average"], after[2]["average"])
    assert (after[2]["skipped"], after[2]["skipped_in_a_row"]) == (1, 1)

    # the same again, killed after both: the counters and what spikes are measured by are in the checkpoint
    calls[0], killed_at[0] = 0, 12
    with pytest.raises(KeyboardInterrupt):
        train(replace(job, run="spoiled-killed"))
    killed_at[0] = 0
    train(replace(job, run="spoiled-killed"))
    one, two = ended(folder), ended(place / "runs/spoiled-killed")
    assert one["events"] == two["events"] and not differences(one, two)


def test_a_full_disk_leaves_the_last_state(
    job: Train, place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, original = replace(job, run="full"), os.fsync

    def full(number: int) -> None:
        if "step-000004" in str(Path(f"/proc/self/fd/{number}").readlink()):
            raise OSError(28, "No space left on device")
        original(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(job)
    folder = place / "runs/full"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert read_checkpoint(folder / "checkpoints/step-000002")[2]["step"] == 2
    monkeypatch.setattr(os, "fsync", original)
    train(job)
    assert not differences(whole, ended(folder))


def test_a_second_process_is_refused(job: Train, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "runs/held"
    with (
        lock_run(folder, print),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is training in runs/held; wait for it, stop it"),
    ):
        train(replace(job, run="held"))
    train(replace(job, run="held", steps=2, validate_every=0))
    assert "held the run" not in capsys.readouterr().out


def test_differences_are_found_and_measured(whole: dict[str, Any], place: Path) -> None:
    assert not differences(whole, ended(place / "runs/whole"))
    other = ended(place / "runs/whole")
    name = next(iter(other["adapter"]))
    other["adapter"][name].view(-1)[3] += 0.25
    other["metrics"][2]["loss"] = 0.5
    del other["state"]["schedule"]["last_epoch"]
    first, second, third = differences(whole, other)
    assert first["what"] == f"adapter.{name}" and first["by"] == pytest.approx(0.25) and first["values"] == 1
    assert second == {"what": "state.schedule.last_epoch", "was": str(STEPS), "is": "None"}
    assert third["what"] == "metrics.2.loss" and third["is"] == "0.5"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_selfcheck_passes_and_fails(
    job: Train, place: Path, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfcheck.py", *as_options(job)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if ranks == 2:
        monkeypatch.setenv("FLUX_LAUNCH", f"{Path(sys.executable).parent / 'torchrun'} --standalone --nproc_per_node 2")
    with pytest.raises(SystemExit) as ends:
        check(replace(job, run=f"checked-{ranks}"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ends.value.code == 0 and result["same"] and result["killed_after"] >= 3 and result["tensors"] > 50
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python, and for several processes set FLUX_LAUNCH"):
        check(job)
    assert (DIFFERS, MEND) == (4, 2)
