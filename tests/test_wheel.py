"""The wheel holds what the repository runs on, and its entries run from any folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from infer.adapter.read import FILE
from infer.program.errors import MEND
from infer.program.paths import ROOT
from scripts.tiny.make_style import make_style

CODE = ("hydra_plugins", "infer", "train")
SHIPPED = ("configs", *(f"scripts/tiny/{name}" for name in ("model", "klein", "klein_distilled")))
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder build/ behind, whose old files the next wheel would hold."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in (*CODE, *SHIPPED):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what an installer unpacks from the wheel."""
    folder = tmp_path_factory.mktemp("site")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    yield folder
    shutil.rmtree(folder)


def python(site: Path, cwd: Path, *words: str, code: int = 0) -> str:
    """What a command prints that finds the project in `site` alone."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_package_config_and_asset_is_in_the_wheel(wheel: Path) -> None:
    def files(folder: str, prefix: str = "") -> set[str]:
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {prefix + path.relative_to(ROOT).as_posix() for path in found}

    expected = set.union(*map(files, CODE), *(files(folder, "infer/shipped/") for folder in SHIPPED))
    assert {"infer/shipped/configs/experiment/demo.yaml", "infer/report/assets/report.js"} <= expected
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_entries_run_from_any_folder(site: Path, tmp_path: Path) -> None:
    said = python(site, tmp_path, "-m", "infer.compare", "--help")
    assert said.startswith("usage: python -m infer.compare ") and "\n  precisions={bf16," in said
    said = python(site, tmp_path, "-m", "train.train", "data.path=/nowhere", code=MEND)
    assert "error: data.path '/nowhere' does not exist" in said
    # what a library says is a defect of ours, though it lies beside our packages there
    (site / "library.py").write_text('def check():\n    raise ValueError("from a library")\n')
    says = (
        "import library\nfrom infer.program.run_names import check_run_name\nfrom infer.program.errors import reason\n"
        "for call in (library.check, lambda: check_run_name('')):\n"
        "    try:\n        call()\n    except ValueError as error:\n        print(reason(error))\n"
    )
    assert python(site, tmp_path, "-c", says).splitlines() == [
        "None",
        "run is ''; choose a plain name such as mine-nf4",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wheel_trains_compares_and_sweeps(site: Path, tmp_path: Path) -> None:
    make_style(tmp_path / "pictures", 8, seed=1)
    common = ["device=cpu", "memory=plain"]
    job = [*common, "data.path=pictures", "data.resolution=64", "steps=2", "validation_levels=1", "adapter.rank=2"]
    python(site, tmp_path, "-m", "train.train", "run=mine", *job)
    assert (tmp_path / "runs/mine/adapter" / FILE).is_file()
    drawn = ["prompts=[a red star]", "only=[nf4]", "sampling.steps=1", "sampling.height=64", "sampling.width=64"]
    python(site, tmp_path, "-m", "infer.compare", "run=mine", "adapter.path=runs/mine/adapter", *drawn, *common)
    assert (tmp_path / "runs/mine/compare/report.html").is_file()
    sweep = ["-m", "run=set", "sweep.compare=null", "hydra/launcher=processes"]
    said = python(site, tmp_path, "-m", "train.train", *sweep, *job, "steps=1")
    assert "best: " in said and len(list(tmp_path.glob(f"runs/set/*/adapter/{FILE}"))) == 1
