"""Training on the bundled model: what is learned, and that neither a crash nor the number of ranks changes it."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.model import Model
from infer.fast import blocks as fused
from infer.fast.memory import KEEP, Memory
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts.tiny.make_style import make_style
from tests.forked import ranks
from tests.wandb_file import read_wandb
from train.data.dataset import Data
from train.data.source import Source
from train.objective.optim import Optim
from train.run.config import Train
from train.trackers.options import Track
from train.train import train

STEP = importlib.import_module("train.loop.step")
SIDE = 64  # 16 packed tokens


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_style(folder, 11, seed=1)
    return folder


@pytest.fixture(scope="module")
def mixed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in three shapes, and beside them a mask for each."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "masks").mkdir()
    for i, file in enumerate(sorted(pictures.glob("*.png"))):
        shape = ((128, 128), (128, 80), (80, 128))[i % 3]
        with Image.open(file) as picture:
            picture.crop((0, 0, *shape)).save(folder / file.name)
        Image.new("L", shape, 40 + 20 * i).save(folder / "masks" / file.name)
    shutil.copy(pictures / "metadata.jsonl", folder)
    return folder


@pytest.fixture
def job(
    pictures: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tiny: Model
) -> Train:
    """A short run in a folder of its own; the cache is shared by all tests."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    return Train(
        model=Model(str(Path(ROOT, "scripts/tiny/model"))),
        precision=Precision("nf4"),
        adapter=Adapter(rank=4, alpha=6, dropout=0.1),
        data=Data(str(pictures), SIDE, 2, "zelk style", 0.2, cache=str(pictures.parent / "cache")),
        optim=Optim(lr=1e-3, schedule="linear"),
        run="short",
        previews=[],
        steps=6,
        accumulation=2,
        save_every=2,
        validate_every=3,
        validation_levels=2,
        device="cpu",
    )


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def metrics(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "optimizer, all_at_once", [("adamw", False), ("adamw", True), ("adamw8bit", False), ("prodigy", False)]
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    job: Train,
    mixed: Path,
    optimizer: str,
    all_at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = replace(job, steps=4, optim=replace(job.optim, name=optimizer, lr=1.0 if optimizer == "prodigy" else 1e-3))
    if all_at_once:
        sources = [Source(str(mixed), str(mixed / "masks"), repeats=0.5), Source(job.data.path, weight=0.3)]
        data = replace(job.data, path="", sources=sources, resolution=[64, 48], flip=True, caption_dropout=0.3)
        job = replace(job, data=data)
    whole = adapter(train(replace(job, run="whole")))

    # in the middle of the fourth update, behind the validation at step 3
    original, calls = train_batch_counter(monkeypatch, stop_at=2 * 3 + 1)
    with pytest.raises(KeyboardInterrupt):
        train(replace(job, run="killed"))
    monkeypatch.setattr(STEP, "training_batch", original)
    assert calls[0] == 7 and any("validation_loss" in event and event["step"] == 3 for event in metrics("killed"))
    assert not Path("runs/killed/adapter").exists()
    resumed = adapter(train(replace(job, run="killed")))
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert same(whole, resumed)

    def events(run: str) -> list[dict[str, float]]:
        return [{k: v for k, v in event.items() if k not in ("seconds", "memory_gib")} for event in metrics(run)]

    assert events("whole") == events("killed")
    # the same command once more trains nothing
    monkeypatch.setattr("train.loop.run.fit", None)
    assert same(whole, adapter(train(replace(job, run="killed"))))
    assert "is finished" in capsys.readouterr().out


def _lora(layer: str, rank: int, columns: int, rows: int) -> dict[str, torch.Tensor]:
    name = f"transformer.{layer}"
    return {f"{name}.lora_A.weight": torch.ones(rank, columns), f"{name}.lora_B.weight": torch.ones(rows, rank)}


QUERY = "transformer_blocks.0.attn.to_q"
BAD_FILES = {
    "another model's": ({"start": _lora(QUERY, 2, 3072, 3072)}, "does not fit this model at"),
    "a layer that is not there": ({"start": _lora("transformer_blocks.9.attn.to_q", 2, 256, 256)}, "unknown to it"),
    "a layer that is no target": ({"start": _lora("transformer_blocks.0.ff.net.2", 2, 1024, 256)}, "choose targets"),
    "a higher rank": ({"start": _lora(QUERY, 5, 256, 256)}, "has rank 5; set adapter.rank=5"),
    "nothing": ({"start": {}}, "holds no tensor"),
    "no recovery": ({"recovery": _lora(QUERY, 2, 256, 256)}, "is no recovery adapter"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_adapter_file_is_refused_before_anything_is_encoded(
    name: str, job: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, said = BAD_FILES[name]
    paths = {}
    for kind, state in files.items():
        paths[kind] = str(tmp_path / f"{kind}.safetensors")
        save_file(state, paths[kind])
    monkeypatch.setattr("train.loop.load.build", None)
    monkeypatch.setattr("train.loop.load.prior_samples", None)
    with pytest.raises(ValueError, match=said):
        train(replace(job, adapter=replace(job.adapter, **paths)))


def test_a_recovery_adapter_of_other_weights_is_refused_before_anything_is_encoded(
    job: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loop.load.build", None)
    notes = {"recovers": {"base": fingerprint(job.model, "transformer")}, "precision": asdict(Precision("fp4"))}
    path = tmp_path / "recovery.safetensors"
    save_file(_lora(QUERY, 2, 256, 256), path, {"flux_lora": json.dumps(notes)})
    with pytest.raises(ValueError, match="was made for kind=fp4, not nf4"):
        train(replace(job, adapter=replace(job.adapter, recovery=str(path))))


def train_batch_counter(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> tuple[Any, list[int]]:
    original, calls = STEP.training_batch, [0]

    def counted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(STEP, "training_batch", counted)
    return original, calls


def test_a_damaged_checkpoint_gives_way_to_the_one_before(job: Train, capsys: pytest.CaptureFixture[str]) -> None:
    whole = adapter(train(replace(job, run="damaged")))
    run = Path("runs/damaged")
    (run / "adapter" / FILE).unlink()
    last = run / "checkpoints/step-000006/adapter.safetensors"
    content = bytearray(last.read_bytes())
    content[-5] ^= 1
    last.write_bytes(content)
    assert same(whole, adapter(train(replace(job, run="damaged"))))
    out = capsys.readouterr().out
    assert "step-000006 is damaged" in out and "resuming at step 4 of 6" in out


def test_another_config_under_the_same_name_is_refused(job: Train) -> None:
    train(replace(job, steps=1))
    with pytest.raises(ValueError, match=r"run 'short' exists with another config \(.*adapter.rank was 4, is 8"):
        train(replace(job, steps=1, adapter=replace(job.adapter, rank=8)))


def test_changed_pictures_are_not_resumed_on(job: Train, monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    original, _ = train_batch_counter(monkeypatch, stop_at=9)
    with pytest.raises(KeyboardInterrupt):
        train(replace(job, run="changed"))
    monkeypatch.setattr(STEP, "training_batch", original)
    metadata = pictures / "metadata.jsonl"
    before = metadata.read_text()
    metadata.write_text(before.replace('"text": "', '"text": "now ', 1))
    try:
        with pytest.raises(ValueError, match=r"the pictures, captions .* have changed since the last checkpoint"):
            train(replace(job, run="changed"))
    finally:
        metadata.write_text(before)


def test_memory_changes_nothing_that_is_learned(job: Train, capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(job, precision=Precision("fp32", compute_dtype="fp32"), steps=2, adapter=Adapter(rank=4))
    plain = adapter(train(replace(job, run="plain", memory=Memory("everything", fused=False))))
    for keep in KEEP:
        fused = adapter(train(replace(job, run=f"fused-{keep}", memory=Memory(keep))))
        for key, value in plain.items():  # by norm: Adam makes much of a near-zero gradient's last bits
            assert float((fused[key] - value).norm()) < 1e-3 * float(value.norm()), (keep, key)
    assert "fast path" not in capsys.readouterr().out
    other = replace(job, adapter=replace(job.adapter, dropout=0.1))
    fallen = adapter(train(replace(other, run="fallen", memory=Memory())))
    assert "note: the fast path is off: adapter.dropout is above 0" in capsys.readouterr().out
    asked = adapter(train(replace(other, run="asked", memory=Memory("nothing", fused=False))))
    assert all(torch.equal(fallen[key], value) for key, value in asked.items())


def test_a_deterministic_run_learns_the_same_and_takes_kernels_that_repeat_themselves(
    job: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of sums apart: on a CPU both repeat themselves."""
    job.adapter.dropout, job.steps, job.validate_every = 0.0, 2, 0
    job.precision = Precision("nf4", compute_dtype="fp32")
    seen = []

    def noted(*args: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return attend(*args)

    attend = fused.repeatable_attention
    monkeypatch.setattr(fused, "repeatable_attention", noted)
    usual = load_file(train(job) / FILE)
    assert not seen
    repeated = load_file(train(replace(job, run="repeated", deterministic=True)) / FILE)
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()
    moved = sum(float(value.square().sum()) for key, value in usual.items() if "lora_B" in key) ** 0.5
    assert sum(float((usual[key] - repeated[key]).square().sum()) for key in usual) ** 0.5 < 1e-2 * moved


@pytest.mark.parametrize(
    ("memory", "part"),
    [
        (Memory(budget_gib=4), "memory.budget_gib bounds a GPU's memory, but the device is cpu"),
        (Memory(graph=True), "memory.graph=true captures CUDA steps, but the device is cpu"),
    ],
)
def test_memory_that_needs_a_gpu_is_refused_without_one(job: Train, memory: Memory, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        train(replace(job, memory=memory, adapter=Adapter(rank=4)))


def test_validation_is_held_out_fixed_and_falls(job: Train, loss_picture: None) -> None:
    job = replace(
        job,
        run="falls",
        steps=24,
        accumulation=1,
        validate_every=12,
        optim=Optim(lr=5e-3, schedule="linear"),
        data=replace(job.data, batch_size=4),
    )
    train(job)
    losses = {event["step"]: event["validation_loss"] for event in metrics("falls") if "validation_loss" in event}
    assert list(losses) == [0, 12, 24] and Path("runs/falls/loss.png").is_file()
    assert losses[24] < 0.8 * losses[0]
    for event in metrics("falls"):  # every picture counts once at each noise level
        if "validation_loss" in event:
            assert sum(event["validation_loss_by_level"]) / 2 == pytest.approx(event["validation_loss"], abs=1e-5)  # type: ignore[call-overload]
    said = json.loads(Path("runs/falls/pictures.json").read_text())
    assert said["step"] == 24 and len(said["pictures"]) == 9
    latest = json.loads(Path("runs/falls/latest.json").read_text())
    assert (latest["state"], latest["reason"], latest["ranks"]) == ("done", None, 1)
    # step 0 depends on nothing that is trained: another optimizer and batch size give the same figure
    other = replace(job, run="other", steps=1, optim=Optim(lr=1e-6), data=replace(job.data, batch_size=1))
    train(other)
    assert metrics("other")[0]["validation_loss"] == pytest.approx(losses[0], rel=2e-3)  # bf16 in other batches


def test_nothing_learned_is_an_error(job: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(ValueError, match="nothing was learned"):
        train(replace(job, run="nothing", steps=1))
    assert not Path("runs/nothing/adapter").exists()


def test_a_loss_that_is_not_finite_stops_the_run(job: Train) -> None:
    job = replace(job, optim=Optim(lr=1e9), steps=9, accumulation=1)
    said = r"not finite 3 times in a row, up to step 4, where the samples were .*\.png, .*\.png: training stopped"
    with pytest.raises(ValueError, match=said):
        train(replace(job, run="wild", stop_after_bad=3, validate_every=0))
    assert [line.get("skipped") for line in metrics("wild") if "lr" in line] == [None, 1, 2, 3]
    assert not Path("runs/wild/adapter").exists()
    with pytest.raises(ValueError, match=r"the validation loss is nan: the adapter's weights are ruined; lower"):
        train(replace(job, run="ruined", validate_every=1))


def test_a_target_that_matches_nothing_says_what_there_is(job: Train) -> None:
    with pytest.raises(ValueError, match=r"'to_x' matches no linear layer.*transformer_blocks\.\*\.attn\.to_q"):
        train(replace(job, run="none", adapter=replace(job.adapter, targets="to_x")))


def test_wandb_offline_gets_figures_config_and_previews(job: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    sampling = replace(job.sampling, steps=1, height=SIDE, width=SIDE)
    train(
        replace(
            job,
            run="tracked",
            steps=2,
            track=Track("wandb", mode="offline"),
            previews=["a red star"],
            sampling=sampling,
        )
    )
    figures, config = [], {}
    for record in read_wandb(Path("runs/tracked")):
        for item in record.history.item:
            figures.append((item.key or "/".join(item.nested_key), item.value_json))
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    losses = [float(value) for key, value in figures if key == "loss"]
    assert losses == [event["loss"] for event in metrics("tracked") if "loss" in event]
    assert any(key.startswith("preview") for key, _ in figures)
    assert config["adapter"]["rank"] == 4 and config["precision"]["kind"] == "nf4"
    assert Path("runs/tracked/previews/step-000002.png").is_file()


def launch(command: list[str], cwd: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def check_alike(one: str, two: str, kind: str) -> None:
    """Two runs learned the same, up to rounding."""
    first, second = (adapter(Path("runs", run, "adapter")) for run in (one, two))
    difference = sum(float((first[key] - second[key]).square().sum()) for key in first) ** 0.5
    moved = sum(float(value.square().sum()) for key, value in first.items() if "lora_B" in key) ** 0.5
    assert moved > 0
    # Adam divides by small second moments: rounding of a sum grows by it; bf16 rounds far more
    assert difference < (1e-3 if kind == "fp32" else 0.1) * moved, difference / moved
    values = [[line["validation_loss"] for line in metrics(run) if "validation_loss" in line] for run in (one, two)]
    assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], rel=1e-5 if kind == "fp32" else 1e-2)


RANKS = """
import pickle
from pathlib import Path
from accelerate import Accelerator
from train.train import train
Accelerator.end_training = lambda self: None  # there is another run to come
for job in pickle.loads(Path("jobs").read_bytes()):
    train(job)
"""


def test_two_ranks_equal_one_with_twice_the_batch(job: Train, mixed: Path) -> None:
    """The same samples, noise and adapter: NF4, against `accelerate launch` with one process, and fp32, of squares and
    of mixed shapes, where most batches are short, some with nothing for the second rank; all in the same processes."""
    job = replace(job, adapter=Adapter(rank=4), steps=3, validate_every=0, save_every=0, accumulation=2)
    exact = replace(job, precision=Precision("fp32"))
    masked = replace(job.data, path="", sources=[Source(str(mixed), str(mixed / "masks"))], resolution=[64, 48])
    jobs = {"nf4": job, "squares": exact, "mixed": replace(exact, data=masked)}
    Path("jobs").write_bytes(pickle.dumps([replace(each, run=f"{name}-two") for name, each in jobs.items()]))
    Path("ranks.py").write_text(RANKS)
    for rank in ranks(2, ["ranks.py"], Path.cwd(), os.environ | {"ACCELERATE_USE_CPU": "true"}, Path("log").absolute()):
        code, said = rank.finish(300)
        assert code == 0, said
    options = [
        f"precision={job.precision.kind}", f"data.path={job.data.path}", f"data.resolution={job.data.resolution}",
        f"data.cache={job.data.cache}", f"data.validation={job.data.validation}", "data.batch_size=4", "adapter.rank=4",
        f"data.trigger={job.data.trigger}", f"optim.lr={job.optim.lr}", f"optim.schedule={job.optim.schedule}",
        "steps=3",
        f"validation_levels={job.validation_levels}", "validate_every=0", "save_every=0", "accumulation=2",
        "previews=[]", "device=cpu", "run=nf4-one",
    ]  # fmt: skip
    single = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    accelerate = str(Path(sys.executable).parent / "accelerate")
    launch([accelerate, "launch", *single, str(ROOT / "train/train.py"), *options], Path.cwd())
    check_alike("nf4-one", "nf4-two", "nf4")
    for name in ("squares", "mixed"):
        train(replace(jobs[name], run=f"{name}-one", data=replace(jobs[name].data, batch_size=4)))
        check_alike(f"{name}-one", f"{name}-two", "fp32")


def test_the_first_checkpoint_comes_early_and_then_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = SimpleNamespace(main=True), 1000.0
    loop: Any = SimpleNamespace(
        session=SimpleNamespace(run=run, job=SimpleNamespace(save_minutes=10.0)), saved=False, saved_at=now
    )
    monkeypatch.setattr(STEP.time, "monotonic", lambda: now)
    due = {}
    for saved, minutes in ((False, 10.0), (True, 10.0), (False, 0.5), (False, 0.0), (True, 0.0)):
        loop.saved, loop.session.job.save_minutes = saved, minutes
        found = []
        for after in (29, 31, 59, 61, 599, 601):
            now = 1000.0 + after
            found.append(STEP.save_overdue(loop))
        due[saved, minutes] = found.index(True) if any(found) else None
    assert due == {(False, 10.0): 3, (True, 10.0): 5, (False, 0.5): 1, (False, 0.0): None, (True, 0.0): None}
    run.main, loop.saved, loop.session.job.save_minutes = False, False, 10.0
    assert not STEP.save_overdue(loop)  # the main rank decides
