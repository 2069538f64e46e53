"""What the trackers are told, read back from their own files: W&B's records and TensorBoard's events."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import PartialState
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from infer.program.paths import ROOT
from tests.wandb_file import read_wandb
from train.run.config import Train
from train.trackers.options import Track
from train.trackers.tracker import SendComparison, make_tracker, send_comparison

CONFIG = {"adapter": {"rank": 4}, "data": {"path": "p", "sources": []}, "model": {"revision": None}}
NOTES = {"step": 3, "adapter": {"rank": 4}, "trigger": None}
RED, BLUE = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder with an adapter and a comparison of one picture without and one with it."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # so that it is as it was afterwards
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/set/mine")
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.safetensors").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.1}\n{"step": 3, "loss": 1.3}\n')
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "compare" / "images").mkdir(parents=True)
    rows = []
    for adapter, picture in ((None, RED), ("mine", BLUE)):
        picture.save(folder / "compare" / "images" / f"{adapter}.png")
        row = {"precision": "nf4", "adapter": adapter, "prompt": "a fox", "seed": 7, "image": f"images/{adapter}.png"}
        row |= {"seconds": 0.5, "seconds_per_step": 0.1, "peak_memory_bytes": 2**31, "weights_bytes": 2**30}
        rows.append(row | {"scores": {"psnr": 3.5}, "stages": {}})
    result = {"model": "m", "device": "cpu", "versions": {}, "sampling": {}, "rows": rows}
    (folder / "compare" / "results.json").write_text(json.dumps(result))
    absent = not PartialState._shared_state
    PartialState(cpu=True)  # as training has it
    yield folder
    if absent:
        PartialState._reset_state()


def told(track: Track, folder: Path) -> None:
    """A run that was killed after step 2 and its last checkpoint at step 1, then ends at step 3."""
    first = make_tracker(track, "set/mine", folder, CONFIG)
    first.log(0, {"validation_loss": 2.0})
    first.log(1, {"loss": 1.1})
    first.log(2, {"loss": 9.9})
    first.finish()
    second = make_tracker(track, "set/mine", folder, CONFIG)
    second.log(2, {"loss": 1.2})
    second.log(3, {"loss": 1.3, "lr": 1e-4})
    second.previews(3, [("a fox", {"base": RED, "adapter": BLUE}), ("a cup", {"base": BLUE, "adapter": RED})])
    second.log(3, {"validation_loss": 0.1})
    second.adapter(folder / "adapter", NOTES)
    second.finish()


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_wandb(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # what an earlier test began reads the environment no more
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    track = Track("wandb", project="p", group="set", tags=["a"], mode="offline")
    told(track, run)
    send_comparison(SendComparison(track, "set/mine"))
    tracker = make_tracker(track, "set/mine", run, CONFIG)
    tracker.log(4, {"lr": 1e-4, "skipped": 1})
    tracker.log(5, {"lr": 1e-4, "skipped": 2})
    time.sleep(2)  # for the system's figures
    tracker.fail(ValueError("the loss is nan"))
    wandb.teardown()
    records = read_wandb(run)
    runs = of_kind(records, "run")
    assert len(runs) == 4 and len({one.run_id for one in runs}) == 1
    assert {(one.project, one.run_group, one.display_name) for one in runs} == {("p", "set", "set/mine")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update if item.key != "_wandb"}
    assert config == CONFIG and list(runs[0].tags) == ["a"]

    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.item}
        for one in of_kind(records, "history")
    ]
    figures = [{k: v for k, v in one.items() if k in ("step", "loss", "lr", "validation_loss")} for one in history]
    assert figures[:5] == [
        {"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": 1.1}, {"step": 2, "loss": 9.9},
        {"step": 2, "loss": 1.2}, {"step": 3, "loss": 1.3, "lr": 1e-4},
    ]  # fmt: skip
    axes = {one.name or one.glob_name: one.step_metric for one in of_kind(records, "metric")}
    assert axes == {"step": "", "*": "step", "validation_loss": "step"}

    artifacts = {one.name.split("-", 2)[-1]: one for one in of_kind(records, "artifact")}
    tables = {}
    for name in ("previews", "comparison"):
        files = {content.path: Path(content.local_path) for content in artifacts[name].manifest.contents}
        assert all(run.resolve() in file.parents for file in files.values())  # nothing is left in the home folder
        tables[name] = json.loads(files[f"{name}.table.json"].read_text())
        for row in tables[name]["data"]:
            for i, cell in enumerate(row):
                if isinstance(cell, dict):
                    row[i] = Image.open(files[cell["path"]]).getpixel((0, 0))
    red, blue = (255, 0, 0), (0, 0, 255)
    assert tables["previews"]["columns"] == ["step", "prompt", "base", "adapter"]
    assert tables["previews"]["data"] == [[3, "a fox", red, blue], [3, "a cup", blue, red]]
    assert tables["comparison"]["data"] == [
        ["a fox", 7, "nf4", "none", red, 0.5, 2.0, 1.0, 3.5],
        ["a fox", 7, "nf4", "mine", blue, 0.5, 2.0, 1.0, 3.5],
    ]
    (panel,) = [one["preview/filenames"] for one in history if "preview/filenames" in one]
    assert [Image.open(next(run.glob(f"wandb/*/files/{name}"))).getpixel((0, 0)) for name in panel] == [blue, red]
    adapter = artifacts["adapter"]
    assert (adapter.type, adapter.name, json.loads(adapter.metadata)) == ("adapter", "set-mine-adapter", NOTES)
    assert [Path(one.local_path).read_bytes() for one in adapter.manifest.contents] == [b"weights"]
    assert [(alert.title, alert.text, alert.level) for alert in of_kind(records, "alert")] == [
        ("set/mine left out an update", "the loss or gradient of step 4 is not finite", "WARN"),
        ("set/mine stopped", "the loss is nan", "ERROR"),
    ]
    assert [one.exit_code for one in of_kind(records, "exit")] == [0, 0, 0, 1]
    assert any(item.key == "cpu" for one in of_kind(records, "stats") for item in one.item)


def test_an_agent_chooses_the_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that goes on without the agent keeps it."""
    import wandb

    track = Track("wandb", mode="offline")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    make_tracker(track, "set/mine", run, {}).finish()
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb.teardown()
    make_tracker(track, "set/mine", run, {}).finish()
    wandb.teardown()
    assert [one.run_id for one in of_kind(read_wandb(run), "run")] == ["chosen", "chosen"]


def test_tensorboard(run: Path) -> None:
    told(Track("tensorboard"), run)
    send_comparison(SendComparison(Track("tensorboard"), "set/mine"))
    events = EventAccumulator(str(run / "tensorboard"), {"tensors": 0, "images": 0}).Reload()
    tags = events.Tags()

    def figures(tag: str) -> list[tuple[int, float]]:
        return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]  # float32

    assert figures("loss") == [(1, 1.1), (2, 1.2), (3, 1.3)]  # 9.9 lay beyond the step that was resumed from
    assert figures("lr") == [(3, 1e-4)] and figures("validation_loss") == [(0, 2.0), (3, 0.1)]
    shown: dict[str, list[Any]] = {}
    for tag in tags["images"]:
        (image,) = events.Images(tag)
        shown.setdefault(tag.split("/")[0], []).append((image.step, image.width, image.height))
    assert shown == {"previews": [(3, 16, 6)] * 2, "comparison": [(3, 8, 6)] * 2}
    assert any("a fox" in tag for tag in tags["images"])
    (text,) = [str(make_ndarray(e.tensor_proto)[0], "utf8") for e in events.Tensors("config/text_summary")][-1:]
    assert yaml.safe_load(text) == CONFIG
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_a_failure_is_written(run: Path) -> None:
    tracker = make_tracker(Track("tensorboard"), "set/mine", run, CONFIG)
    tracker.log(4, {"loss": 1.0})
    tracker.fail(ValueError("the loss is nan"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (event,) = events.Tensors("stopped/text_summary")
    assert event.step == 4 and make_ndarray(event.tensor_proto)[0] == b"the loss is nan"


def test_an_absent_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"track={kind} needs the {kind} package: pip install {kind}"):
            make_tracker(Track(kind), "set/mine", run, {})


@pytest.mark.parametrize(
    "given, message",
    [
        (SendComparison(Track(), "set/mine"), "track is none, so no tracker gets the comparison; set track=wandb"),
        (SendComparison(Track("tensorboard"), "other"), "there is no runs/other/compare/results.json; make it with"),
    ],
)
def test_nothing_to_tell(run: Path, given: SendComparison, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        send_comparison(given)


def test_the_command(run: Path) -> None:
    command = [sys.executable, str(ROOT / "train/track.py"), "run=set/mine", "track=tensorboard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "sent runs/set/mine/compare to tensorboard\n"
    assert list((run / "tensorboard").iterdir())


def test_an_agent_of_wandb_starts_the_shipped_sweep(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own agent, its server's three answers given here; what it starts is noted instead of trained."""
    import multiprocessing

    import wandb
    from wandb.apis.public import sweeps
    from wandb.wandb_agent import Agent

    sweep = yaml.safe_load((ROOT / "configs/wandb/sweep.yaml").read_text())
    note = Path("note.py").resolve()
    note.write_text("import json, os, sys; json.dump([sys.argv[1:], os.environ['WANDB_RUN_ID']], open('noted', 'w'))")
    sweep["command"][sweep["command"].index("python")] = sys.executable
    names = {"precision": "int8", "adapter.rank": 16, "optim.lr": 0.00031}
    assert sweep["parameters"].keys() == names.keys()
    start = {"type": "run", "run_id": "abc", "program": str(note), "args": {k: {"value": v} for k, v in names.items()}}
    answers = iter([[start], [], []])
    monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *_: {"config": yaml.safe_dump(sweep)})
    monkeypatch.setattr(sweeps, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(sweeps, "_agent_heartbeat", lambda *_: next(answers, []))
    monkeypatch.setattr(wandb, "Api", lambda: None)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_DIR", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Agent, "POLL_INTERVAL", 0.1)
    Agent(None, multiprocessing.Queue(), sweep_id="s", count=1).run()
    words, identity = json.loads(Path("noted").read_text())
    assert identity == "abc"
    assert words[3:] == ["precision=int8", "adapter.rank=16", "optim.lr=0.00031"]
    monkeypatch.setenv("WANDB_RUN_ID", identity)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        ConfigStore.instance().store(name="train_schema", node=Train)
        options: Any = OmegaConf.to_object(compose("train", words))
    assert (options.run, options.track.kind, options.precision.kind) == ("swept/abc", "wandb", "int8")
    assert (options.adapter.rank, options.optim.lr, options.data.trigger) == (16, 0.00031, "zelk style")
    assert sweep["metric"] == {"name": "validation_loss", "goal": "minimize"}
