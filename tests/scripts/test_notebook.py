"""The notebook's cells, run one after another on the bundled model, as a notebook runs them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infer.program.paths import ROOT
from tests.forked import Forked

NOTEBOOK = ROOT / "docs" / "free-notebook.ipynb"


def sources() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any], environment: dict[str, str]) -> Any:
    """`!` lines go to a shell that knows the names, those of plain commands to processes whose libraries are imported
    (tests/forked.py); `%cd` changes the folder, the rest is Python; the last value."""
    plain = []
    for line in source.splitlines():
        if line.startswith("%cd "):
            os.chdir(line.removeprefix("%cd "))
        elif line.startswith("!"):
            known = {name: str(value) for name, value in names.items() if isinstance(value, str | int)}
            # a notebook puts values into the line before a shell splits it
            for name, value in sorted(known.items(), key=lambda pair: -len(pair[0])):
                line = line.replace(f"${name}", value)
            words = shlex.split(line[1:])
            if words[0] == "python":
                code, said = Forked(words[1:], Path.cwd(), environment, Path.cwd() / "said").finish(300)
                assert code == 0, said
            else:
                subprocess.run(["bash", "-c", line[1:]], check=True, env=environment)
        else:
            plain.append(line)
    if not plain:
        return None
    *before, last = "\n".join(plain).strip().split("\n")
    if not last.startswith("Image.open"):
        exec("\n".join(plain), names)
        return None
    exec("\n".join(before), names)
    return eval(last, names)


def test_the_notebook_goes_from_installation_to_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is already there is not fetched again: the repository is, and pip is asked for it and nothing more."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"python": f'exec "{sys.executable}" "$@"', "pip": f'echo "$@" > "{tmp_path}/installed"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    copy = tmp_path / "flux-lora"
    copy.mkdir()
    for name in ("configs", "docs", "hydra_plugins", "infer", "scripts", "train", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    names: dict[str, Any] = {}
    shown = []
    for source in sources():
        # fewer steps than a reader takes, of a smaller picture: the commands are the same
        source = source.replace("STEPS, PROMPT = 100", "STEPS, PROMPT = 2").replace("SIDE = 192", "SIDE = 64")
        source = source.replace("resolution=192", "resolution=64")
        source = source.replace("sampling.steps=16", "sampling.steps=2")
        value = run_cell(source, names, environment)
        if isinstance(value, Image.Image):
            shown.append(value)
    assert (tmp_path / "installed").read_text().split() == ["install", "-q", "-e", "."]
    preview, comparison = shown
    assert preview.width == 2 * 256 and comparison.width > 0
    assert (copy / "runs/notebook/adapter/pytorch_lora_weights.safetensors").is_file()
    rows = json.loads((copy / "runs/notebook/compare/results.json").read_text())["rows"]
    assert [(row["precision"], row["adapter"]) for row in rows] == [("nf4", None), ("nf4", "notebook")]


def test_the_notebook_asks_for_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty; give the address"):
        exec(sources()[0], {})
    (tmp_path / "flux-lora").mkdir()
    exec(sources()[0], {})
    (tmp_path / "flux-lora").rmdir()
    exec(sources()[0].replace('""', '"https://example.org/flux-lora"'), {})


def test_the_notebooks_other_model_composes() -> None:
    """FLUX.1-dev's settings are those of a shipped experiment, on the card that they are for."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from infer.comparison.settings import Compare
    from train.run.config import Train

    names: dict[str, Any] = {}
    (choice,) = (source for source in sources() if source.startswith("MODEL ="))
    exec(choice.replace('MODEL = "tiny"', 'MODEL = "dev"'), names)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Train)
    store.store(name="compare_schema", node=Compare)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        job: Any = OmegaConf.to_object(compose("train", names["SETTINGS"].split()))
        OmegaConf.to_object(compose("compare", [*names["COMPARE"].split(), "prompts=[a cup]"]))
    assert job.model.path == "black-forest-labs/FLUX.1-dev" and job.precision.kind == "nf4"
    assert job.data.resolutions == [512] and job.sampling.size(1024) == (512, 512)
