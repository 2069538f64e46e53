"""What is written to disk, each as: a good state, the write that may fail, and how what is there is read."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.report import write as report
from infer.report.results import Comparison, from_json
from scripts.bad.case import colours
from scripts.bad.reports import RESULT
from train.latents.identities import Picture, read_identities, write_identities
from train.latents.shards import DamagedError, ShardIndex, read_item, write_shard
from train.run.config import Train
from train.state.checkpoint import read_checkpoint, save_checkpoint
from train.state.identity import record_config
from train.state.steps import list_checkpoints


@dataclass(frozen=True)
class Thing:
    """One kind of file."""

    name: str
    write: Callable[[Path, int], Any]
    """Writes state 1 or 2 below a folder."""
    read: Callable[[Path], Any]
    """What the program finds there: as JSON, equal for equal states. Raises ValueError for what is damaged."""
    files: Callable[[Path], list[Path]]
    """The files of the newest state, whose bytes can be damaged."""
    checked: bool = True
    """Damage to its bytes is noticed when it is read."""
    older: bool = False
    """State 1 stays beside state 2 and is taken where that is damaged."""
    mend: str | None = None
    """What it says where it does not write over what is damaged: that it be taken away, after which it is written."""


def _tensor(state: int) -> torch.Tensor:
    return torch.arange(6.0) + state


def _write_checkpoint(folder: Path, state: int) -> None:
    optimizer = {"state": {0: {"m": _tensor(state)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    rest = {"schedule": {}, "validation": {"0": state / 3}, "samples": "x"}
    save_checkpoint(folder / "checkpoints", state, {"a.lora_A": _tensor(state)}, optimizer, rest)


def _read_checkpoint(folder: Path) -> Any:
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            adapter, optimizer, rest = read_checkpoint(path)
        except ValueError:
            continue
        return [adapter["a.lora_A"].tolist(), optimizer["state"][0]["m"].tolist(), rest["step"]]
    raise ValueError("no checkpoint is whole")


def _newest(folder: Path) -> list[Path]:
    return sorted(list_checkpoints(folder / "checkpoints")[-1].iterdir())


def _layers(state: int) -> Any:
    """A model of one layer with an adapter."""
    from diffusers import ModelMixin
    from diffusers.loaders import PeftAdapterMixin

    class One(ModelMixin, PeftAdapterMixin):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

    model = One()
    attach(model, Adapter(rank=2, targets="all", init="gaussian"), seed=state)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data + state
    return model


def _write_adapter(folder: Path, state: int) -> None:
    save_adapter(_layers(state), folder / "adapter", {"step": state})


def _read_adapter(folder: Path) -> Any:
    (file,) = _adapter_file(folder)
    try:
        return {name: tensor.tolist() for name, tensor in load_file(file).items()}
    except Exception as error:
        raise ValueError(str(error)) from error


def _adapter_file(folder: Path) -> list[Path]:
    return [folder / "adapter" / "pytorch_lora_weights.safetensors"]


def _write_item(folder: Path, state: int) -> None:
    write_shard(folder / "pictures", {f"key{state}": {"mean": _tensor(state)}})


def _read_items(folder: Path) -> Any:
    """The newest item that can be read: a damaged shard counts as absent."""
    index = ShardIndex(folder / "pictures", lambda _: None)
    index.refresh()
    for key in ("key2", "key1"):
        if file := index.find(key):
            try:
                return read_item(file, key, "mean")["mean"].tolist()
            except DamagedError as damage:
                index.distrust(damage)  # as the program does
    raise ValueError("no shard is whole")


def _shard(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*.safetensors"))[-1:]


def _write_rows(folder: Path, state: int) -> None:
    write_identities(folder / "index", {bytes([state]) * 32: Picture("09" * 32, 64, 64)})


def _read_rows(folder: Path) -> Any:
    rows = sorted(key.hex()[:2] for key, _ in read_identities(folder / "index", lambda _: None))
    if not rows:
        raise ValueError("no row is whole")
    return rows[-1]


def _rows_file(folder: Path) -> list[Path]:
    return sorted((folder / "index").glob("*.safetensors"))[-1:]


def _write_report(folder: Path, state: int) -> None:
    own = folder / "compare"
    if not own.is_dir():
        (own / "images").mkdir(parents=True)
        colours(1).save(own / "images" / "a.png")
    result = copy.deepcopy(RESULT)
    result["rows"][0]["seconds"] = float(state)  # type: ignore[index]
    report.write(from_json(Comparison, result, ""), own)


def _read_report(folder: Path) -> Any:
    result = json.loads((folder / "compare" / "results.json").read_text())
    for name in ("report.html", "report.md", "comparison.png"):
        content = (folder / "compare" / name).read_bytes()
        if not content or (name.endswith("html") and b"</html>" not in content):
            raise ValueError(f"{name} is cut")
    return result["rows"][0]["seconds"]


def _write_config(folder: Path, state: int) -> None:
    record_config(Train(seed=state), folder, 1)


def _read_config(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_bytes())["seed"]


def things() -> list[Thing]:
    return [
        Thing("checkpoint", _write_checkpoint, _read_checkpoint, _newest, older=True),
        Thing("adapter", _write_adapter, _read_adapter, _adapter_file, checked=False),
        Thing("cache shard", _write_item, _read_items, _shard, older=True),
        Thing("index shard", _write_rows, _read_rows, _rows_file, older=True),
        Thing("results", _write_report, _read_report, partial(_in, "compare/results.json"), checked=False),
        Thing(
            "config", _write_config, _read_config, partial(_in, "config.yaml"), checked=False, mend="or take it away"
        ),
    ]


def _in(name: str, folder: Path) -> list[Path]:
    return [folder / name]
