"""A checkpoint that is absent, gated or incomplete, and the fingerprint of one that is there."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from infer.checkpoint.family import own_size
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.headers import check_model
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family import flux1
from infer.quantize.precision import Precision

CPU = torch.device("cpu")


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, LocalEntryNotFoundError):
        return kind("no file in the local cache")
    response: Any = Mock(spec=httpx.Response, headers={}, status_code=403, request=None)
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "owner/name is gated: accept its licence .* `hf auth login`"),
        (RepositoryNotFoundError, "the Hub has no model 'owner/name'"),
        (LocalEntryNotFoundError, "cannot load the transformer of owner/name: .*download it elsewhere"),
    ],
)
def test_a_model_that_the_hub_does_not_give(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=message):
        load_transformer(Model("owner/name"), Precision("nf4"), CPU)


def test_folders_that_are_no_checkpoint(tiny: Model, tmp_path: Path) -> None:
    check_model(tiny)
    check_model(Model("owner/name"))
    with pytest.raises(ValueError, match=r"holds no model_index.json.*or a single file"):
        check_model(Model(str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match=r"is of a StableDiffusionPipeline; this toolkit reads FLUX\.1 and FLUX\.2"):
        check_model(Model(str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for part in flux1.PARTS[:-1]:
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="lacks the folders vae"):
        check_model(Model(str(tmp_path)))


def test_a_broken_weights_file_is_named(tiny: Model, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny.path, copy)
    weights = next((copy / "vae").glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"cannot load the vae of .*copy the checkpoint again"):
        load_vae(Model(str(copy)), CPU)


def test_fingerprints_follow_the_weights_alone(tiny: Model, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny.path, copy)
    assert fingerprint(Model(str(copy)), "vae") == fingerprint(tiny, "vae") != fingerprint(tiny, "transformer")
    weights = next((copy / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(Model(str(copy)), "vae") != fingerprint(tiny, "vae")
    assert own_size(tiny) == 192
