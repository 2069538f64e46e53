"""Prompts as they are typed: what the shell leaves of them, and files of them."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from infer.program.literal import literal_arguments
from infer.program.paths import CONFIGS, ROOT
from infer.program.prompts import prompt_notes, read_prompt_files
from train.run.config import Train


def previews(*words: str) -> list[str]:
    """What a run gets for previews."""
    ConfigStore.instance().store(name="train_schema", node=Train)
    arguments = literal_arguments(read_prompt_files(list(words), Train), Train)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        job: Any = OmegaConf.to_object(compose("train", arguments))
    GlobalHydra.instance().clear()
    found: list[str] = job.previews
    return found


@pytest.mark.parametrize(
    "typed, prompts, noted",
    [
        ('previews=["sks, a cup"]', ["sks", "a cup"], True),
        ("previews='[\"sks, a cup\"]'", ["sks, a cup"], False),
        ('previews=\'["sks, a cup","a dog"]\'', ["sks, a cup", "a dog"], False),
        ("'previews=[a red star]'", ["a red star"], False),
        ("previews=[]", [], False),
    ],
)
def test_quotation_marks_that_the_shell_takes(typed: str, prompts: list[str], noted: bool) -> None:
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, check=True)
    (word,) = shell.stdout.splitlines()
    assert previews(word) == prompts
    notes = prompt_notes([word], Train)
    assert bool(notes) == noted
    if noted:  # what the note says to write is what was meant
        (mend,) = shlex.split(notes[0].split("write ")[1].split(", or a prompt")[0])
        assert previews(mend) == ["sks, a cup"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Zs"])), min_size=1))
def test_a_file_of_prompts_is_taken_as_it_stands(tmp_path: Path, lines: list[str]) -> None:
    file = tmp_path / "prömpts.txt"
    file.write_text("\n".join(["sks, a ${x} cup", "", *lines]), encoding="utf-8")
    kept = [line for line in lines if line.strip()]
    assert previews(f"previews=@{file}") == ["sks, a ${x} cup", *kept]


@pytest.mark.parametrize(
    "content, said",
    [(None, "there is no file"), (b"\xff\xfe\x00", "save it as a text file in UTF-8"), (b" \n", "holds no prompt")],
)
def test_a_file_that_is_none(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_prompt_files([f"previews=@{file}"], Train)


def test_values_beyond_ascii_work_from_the_shell_on(tmp_path: Path) -> None:
    """A folder, a run's name, and a home folder with letters beyond ASCII, in a locale that has none."""
    home = tmp_path / "Jürgen"
    (home / "photosété").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, ROOT / "train/train.py", "data.path=~/photosété", "run=läufe", "previews=[ein Bär]"],
        cwd=home, env={"HOME": str(home), "LC_ALL": "C", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{home}/photosété holds no pictures" in done.stderr
