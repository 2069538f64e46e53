"""A path at which nothing is: what was meant is found by what is there."""

import unicodedata
from pathlib import Path

import pytest

from infer.program.absent import meant


@pytest.mark.parametrize("path, mend", [
    ("my_picture", "did you mean 'my_pictures'?"),
    ("My_Pictures/", "did you mean 'my_pictures'?"),
    ("my_pictures ", "did you mean 'my_pictures', without the spaces around it?"),
    (unicodedata.normalize("NFD", "photosété"), "did you mean 'photosété'?"),
    ("run/mine/adapter", "did you mean 'runs/mine/adapter'?"),
    ("runs\\mine\\adapter", "did you mean 'runs/mine/adapter'?"),
    ("runs/mne/adapter", "did you mean 'runs/mine/adapter'?"),
    ("runs/mine/elsewhere", "check the spelling"),
    ("quite_another", "check the spelling"),
    ("run/mine/nothing", "check the spelling"),
    ("$HOME/my_pictures", "only outside of single quotation marks"),
    ("%USERPROFILE%/my_pictures", "only outside of single quotation marks"),
    ("https://huggingface.co/a/b/tree/main", "write a/b"),
    ("hf.co/datasets/a/b", "write a/b"),
    ("https://example.com/pictures.zip", "an address like this is not read here: download it"),
    ("C:\\\\Users\\\\me", "within WSL Windows' disk C: is the folder /mnt/c"),
    ("flux1-dev.safetensor", "did you mean 'flux1-dev.safetensors'?"),
    ("Flux1_dev.safetensors", "did you mean 'flux1-dev.safetensors'?"),
    ("gone.safetensors", "check the spelling"),
    ("/nowhere/at/all", "check the spelling"),
    ("", "check the spelling"),
])  # fmt: skip
def test_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, mend: str) -> None:
    for folder in ("my_pictures", "runs/mine/adapter", "photosété"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flux1-dev.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert mend in meant(path)
