"""A run's folder is known by what its config names, and not by how it is spelled; nothing of others is overwritten."""

import importlib
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE, read_notes
from infer.checkpoint.model import Model
from infer.program.paths import ROOT
from infer.sample.encode import NotFiniteError
from infer.sample.generate import Sampling
from scripts.tiny.make_style import make_style
from train.data.dataset import Data, Prior
from train.data.source import Source
from train.objective.optim import Optim, make_schedule, rate_at
from train.run.config import Train
from train.state.identity import record_config, recorded_steps
from train.train import train

TINY = Model(str(ROOT / "scripts/tiny/model"))
FIT = importlib.import_module("train.loop.fit")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, which is where one works, with a training set and two adapters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("set", "other", "masks", "model"):
        Path(name).mkdir()
    for name, content in (("a", b"1"), ("b", b"2")):
        Path(f"{name}.safetensors").write_bytes(content)
    Path("link").symlink_to("set")
    return tmp_path


def begun(folder: Path, **changes: Any) -> Train:
    """A run that has a checkpoint."""
    job = Train(data=Data("set", masks="masks"), run="mine")
    job = replace(job, **changes)
    record_config(job, folder, 1)
    (folder / "checkpoints" / "step-000200").mkdir(parents=True)
    return job


@pytest.mark.parametrize("spelled", ["set/", "./set", "set/../set", "{home}/set", "~/set", "link", "{home}/link/"])
def test_one_folder_has_many_spellings(spelled: str, home: Path) -> None:
    folder = home / "runs" / "mine"
    job = begun(folder)
    written = (folder / "config.yaml").read_bytes()
    assert record_config(replace(job, data=replace(job.data, path=spelled.format(home=home))), folder, 1) == 1
    assert (folder / "config.yaml").read_bytes() == written
    for data in (replace(job.data, path="other"), replace(job.data, masks=None), replace(job.data, path="nowhere")):
        with pytest.raises(ValueError, match="run 'mine' exists with another config"):
            record_config(replace(job, data=data), folder, 1)


def test_every_path_of_a_config_is_one(home: Path) -> None:
    folder = home / "runs" / "mine"
    data = Data(sources=[Source("set", "masks"), Source("other")], prior=Prior("other", "a dog"))
    job = begun(folder, data=data, model=Model("model"), adapter=Adapter(start="a.safetensors", recovery=None))
    again = Data(sources=[Source("set/", "./masks/"), Source(str(home / "other"))], prior=Prior("~/other", "a dog"))
    adapter = replace(job.adapter, start=str(home / "a.safetensors"))
    assert record_config(replace(job, data=again, model=Model("~/model"), adapter=adapter), folder, 1) == 1
    shutil.copy("a.safetensors", "copy.safetensors")
    assert record_config(replace(job, adapter=replace(adapter, start="copy.safetensors")), folder, 1) == 1
    for start in ("b.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=f"adapter.start was 'a.safetensors', is '{start}'"):
            record_config(replace(job, adapter=replace(adapter, start=start)), folder, 1)
    with pytest.raises(ValueError, match=r"data\.sources\.0\.path was 'set', is 'other'"):
        record_config(replace(job, data=replace(data, sources=[Source("other"), Source("set")])), folder, 1)


def test_what_has_moved_is_left_to_its_content(home: Path) -> None:
    folder = home / "runs" / "mine"
    job = begun(folder, model=Model("owner/name"))
    Path("set").rename("elsewhere")
    assert record_config(replace(job, data=replace(job.data, path="elsewhere"), model=Model("model")), folder, 1) == 1


def test_a_copy_of_the_checkpoint_is_left_to_its_content(home: Path) -> None:
    """Such as that of another copy of the repository."""
    folder = home / "runs" / "mine"
    for name, layers in (("model", 2), ("copied", 2), ("different", 3)):
        (home / name / "transformer").mkdir(parents=True)
        (home / name / "transformer" / "config.json").write_text(f'{{"num_layers": {layers}}}')
    job = begun(folder, model=Model("model"))
    assert record_config(replace(job, model=Model("copied")), folder, 1) == 1
    with pytest.raises(ValueError, match=r"model\.path was 'model', is 'different'"):
        record_config(replace(job, model=Model("different")), folder, 1)


GROUPS_THAT_MAY_CHANGE = "memory", "sampling", "track", "sweep", "networks", "stop"
MAY_CHANGE = {
    "deterministic", "save_every", "save_minutes", "keep", "keep_best", "resume", "stop_after_bad", "spikes",
    "scores_every", "unrelated", "validate_every", "preview_every", "previews", "edits", "push", "mirror", "device",
    "data.on_error", "data.least",
    "data.cache",
    "encode.batch_pixels", "encode.workers", "encode.decode_pixels", "encode.shard_mib", "encode.flush_seconds",
    "encode.verify", "validation_levels", "data.image_column", "data.caption_column", "data.caption_lines",
    "data.most_pixels",
    *(f"data.sources.{i}.{name}" for i in (0, 1) for name in ("image_column", "caption_column", "subset", "split")),
}  # fmt: skip


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting of a config and of its groups: its dotted name, its dataclass, its name in it."""
    for each in fields(config):
        value, name = getattr(config, each.name), f"{prefix}{each.name}"
        assert set(each.metadata) <= {"may_change"}, f"{name}: another word in its metadata would do nothing"
        if is_dataclass(value):
            yield from settings(value, f"{name}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from settings(item, f"{name}.{i}.")
        else:
            yield name, config, each.name


def test_every_setting_is_repeated_or_said_to_be_free(home: Path) -> None:
    folder = home / "runs" / "mine"
    job = begun(folder, data=Data(sources=[Source("set", "masks"), Source("other")]))
    names = {name for name, _, _ in settings(job)}
    assert len(names) > 100 and {"adapter.rank", "data.sources.1.repeats", "track.kind", "data.prior.ratio"} <= names
    assert names >= MAY_CHANGE
    for name in names:
        changed = deepcopy(job)
        ((_, group, own),) = [found for found in settings(changed) if found[0] == name]
        setattr(group, own, 10**6 if name == "steps" else "something else")
        if name in MAY_CHANGE or name.split(".")[0] in GROUPS_THAT_MAY_CHANGE or name == "steps":
            assert record_config(changed, folder, 1) == 1, name
        else:
            with pytest.raises(
                ValueError, match=rf"exists with another config \({re.escape(name)} was .*something else"
            ):
                record_config(changed, folder, 1)


def test_what_an_older_version_recorded_of_settings_that_are_free_now(home: Path) -> None:
    folder = home / "runs" / "mine"
    job = begun(folder, data=Data(sources=[Source("set"), Source("other")]))
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    recorded["validation_levels"] = 3
    recorded["data"]["most_pixels"] = 7
    recorded["data"]["sources"][1]["split"] = "test"
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert record_config(job, folder, 1) == 1


def test_settings_that_an_older_version_had_not_are_at_their_default(home: Path) -> None:
    folder = home / "runs" / "mine"
    job = begun(folder)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    del recorded["precision"]["products"], recorded["distilled"]
    recorded["data"]["prior"] |= {"steps": 28, "guidance": 3.5}  # the defaults of then, and no picture is drawn
    text = yaml.safe_dump(recorded)
    (folder / "config.yaml").write_text(text)
    assert record_config(job, folder, 1) == 1
    with pytest.raises(ValueError, match=r"precision\.products was 'bf16', is 'fp8'"):
        record_config(replace(job, precision=replace(job.precision, products="fp8")), folder, 1)
    drawing = replace(job, data=replace(job.data, prior=Prior(prompt="a dog", count=2)), model=TINY)
    recorded["data"]["prior"] |= {"count": 2, "prompt": "a dog"}
    recorded["model"]["path"] = TINY.path
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert record_config(drawing, folder, 1) == 1  # 28 steps are the checkpoint's own
    recorded["data"]["prior"]["steps"] = 20
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    with pytest.raises(ValueError, match=r"data\.prior\.steps was 20, is None"):
        record_config(drawing, folder, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    make_style(folder / "pictures", 6, seed=3)
    return folder


@pytest.fixture
def job(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures / "pictures", "pictures")
    return Train(
        model=Model(str(ROOT / "scripts/tiny/model")), adapter=Adapter(rank=2, targets="single"),
        data=Data("pictures", 64, 2, validation=0.2, cache=str(pictures / "cache")), optim=Optim(lr=1e-3, warmup=1),
        steps=2, save_every=1, validate_every=1, validation_levels=1, ema=0.5, run="short", device="cpu", previews=[],
        sampling=Sampling(steps=1, height=64, width=64),
    )  # fmt: skip


def adapters(run: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(f"runs/{run}/{name}/{FILE}") for name in ("adapter", "adapter-ema")]


def rates(run: str) -> list[float]:
    import json

    lines = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if "lr" in line]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_go_on(schedule: str, job: Train, capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(job, optim=replace(job.optim, schedule=schedule, warmup=0))
    train(job)
    capsys.readouterr()
    Path("pictures").rename("moved")  # and from another place at the same time
    more = replace(job, steps=4, data=replace(job.data, path=str(Path("moved").resolve())))
    train(more)
    said = capsys.readouterr().out
    assert "resuming at step 2 of 4" in said and "note: steps was 2 and is 4: " in said
    train(replace(more, run="whole"))
    expected = [rate_at(job.optim, 4, step) for step in (2, 3)]
    assert rates("short")[2:] == rates("whole")[2:] == pytest.approx(expected)
    pairs = zip(adapters("short"), adapters("whole"), strict=True)
    equal = [all(torch.equal(a[key], b[key]) for key in b) for a, b in pairs]
    assert equal == [schedule == "constant"] * 2
    assert recorded_steps(Path("runs/short")) == 4
    if schedule == "cosine":
        assert "falls to 0 at the last step, so at step 2 the rate goes from 0.00e+00 to 5.00e-04" in said
        train(replace(more, run="short", steps=5, validation_levels=2))  # another measure, and the same learning
        assert "note: validation_levels was 1 and is 2: validation figures begin anew" in capsys.readouterr().out
        notes = read_notes(Path("runs/short/adapter") / FILE)
        assert list(notes["validation"]) == ["4", "5"]
        return
    with pytest.raises(ValueError, match="steps is 3, but run 'short' is at step 4 already; set steps=4 or more"):
        train(replace(more, steps=3))
    train(more)
    assert "run 'short' is finished" in capsys.readouterr().out
    # the checkpoints are gone: nothing that is there is replaced by what starts anew
    shutil.rmtree("runs/short/checkpoints")
    with pytest.raises(ValueError, match="is of another number of steps, and there is no checkpoint to go on from"):
        train(replace(more, steps=5))


def test_rates_are_those_of_the_schedule() -> None:
    optim = Optim(lr=0.5, schedule="linear", warmup=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    schedule = make_schedule(optim, optimizer, 6)
    for step in range(6):
        assert rate_at(optim, 6, step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_an_adapter_of_others_is_not_overwritten(job: Train) -> None:
    foreign = {"transformer.x.lora_A.weight": torch.ones(1, 1)}
    for run, name in (("first", "adapter"), ("second", "adapter-ema")):
        file = Path("runs", run, name, FILE)
        file.parent.mkdir(parents=True)
        save_file(foreign, file)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=rf"{name}/{FILE} was not written by this run"):
            train(replace(job, run=run))
        assert file.read_bytes() == before and not Path("runs", run, "config.yaml").exists()
    # put there while the run was stopped, or after it: one of another program, and one of another run
    train(job)
    train(replace(job, run="other", seed=1))
    record = Path("runs/short/adapter.sha256").read_text()
    assert record.count("\n") == 3 and f"  adapter/{FILE}\n" in record and "  adapter/README.md\n" in record
    for theirs in (foreign, None):
        file = Path("runs/short/adapter", FILE)
        save_file(theirs, file) if theirs else shutil.copy(f"runs/other/adapter/{FILE}", file)
        for steps in (2, 3):
            with pytest.raises(ValueError, match="was not written by this run"):
                train(replace(job, steps=steps))
    # killed between the adapter and its record
    shutil.rmtree("runs/short/adapter")
    Path("runs/short/adapter.sha256").unlink()
    shutil.copytree("runs/other/adapter", "runs/short/adapter")
    train(job)


def test_an_edited_card_is_not_overwritten(job: Train, capfd: pytest.CaptureFixture[str]) -> None:
    job = replace(job, run="card")
    card = train(job) / "README.md"
    train(replace(job, steps=3))
    assert [file.name for file in card.parent.glob("*.md")] == ["README.md"]  # nobody edited it
    card.write_text("my own words")
    capfd.readouterr()
    train(replace(job, steps=4))
    edited = card.with_name("README.edited.md")
    assert edited.read_text() == "my own words" and "at step 4" in card.read_text()
    assert f"note: the card was edited; as it was it is {edited} now" in "".join(capfd.readouterr())


def test_previews_that_are_not_finite_end_no_training_and_are_said(
    job: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ruined(*_: Any) -> None:
        raise NotFiniteError("the picture of seed 0 is not finite")

    monkeypatch.setattr(FIT, "preview", ruined)
    with pytest.raises(ValueError, match="the adapter is saved, but the last previews are not drawn: the picture"):
        train(replace(job, previews=["a red star"]))
    assert Path("runs/short/adapter", FILE).is_file()
    assert "step 2: the previews are not drawn: the picture of seed 0" in "".join(capfd.readouterr())
    assert yaml.safe_load(Path("runs/short/config.yaml").read_text())["steps"] == 2
