"""A checkpoint in the Hub's cache and no network, against the same one in a folder."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from functools import cache as cached
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from infer.checkpoint import hub
from infer.checkpoint.files import pipeline_index, read_config
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.text import load_text_parts
from infer.quantize.precision import Precision
from infer.save import Save, save

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sharded(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with T5 in shards too, as FLUX.1-dev's is."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(tiny.path, folder)
    whole = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(whole)
    places = {}
    for part in (1, 2):
        name = f"model-0000{part}-of-00002.safetensors"
        own = {key: value for i, (key, value) in enumerate(tensors.items()) if i % 2 == part - 1}
        save_file(own, whole.with_name(name), metadata={"format": "pt"})
        places |= dict.fromkeys(own, name)
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def fill(cache: Path, name: str, files: Path, ref: str = "main", tree: list[str] | None = None) -> Path:
    """Lay files down as the Hub's library does. tree: what the repository is known to hold. Returns the snapshot."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs" / ref).write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    for file in files.rglob("*"):
        if not file.is_file():
            continue
        content = file.read_bytes()
        blob = hashlib.sha256(content) if file.suffix == ".safetensors" else hashlib.sha1(content)
        (root / "blobs" / blob.hexdigest()).write_bytes(content)
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(file.relative_to(files).parts) + 1)
        link.symlink_to(f"{up}blobs/{blob.hexdigest()}")
    if tree is not None and find_spec("huggingface_hub._tree_cache"):  # earlier versions of the library know no tree
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

        there = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
        entry = TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
        write_tree_cache(str(root), COMMIT, dict.fromkeys([*there, *tree], entry))
    return snapshot


def forget() -> None:
    """What a process asks once."""
    hub.hub_part.cache_clear()
    hub.reachable.cache_clear()


@pytest.fixture(params=["offline", "unreachable", "left to the library"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the Hub, on a machine that is told to be offline, or whose network leads nowhere; there we see
    so at once, or, as behind a proxy, the library does after its tries (without the pauses between them)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if request.param == "left to the library":
        monkeypatch.setattr(hub, "reachable", cached(lambda: True))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
    else:
        monkeypatch.setattr(hub, "getproxies", dict)
    forget()
    yield tmp_path / "hub"
    forget()


def check_loads(model: Model, folder: Path) -> None:
    """Every part is that of the folder."""
    other = Model(str(folder))
    bf16 = Precision("bf16")
    ours, theirs = ((load_transformer(each, bf16, CPU), load_vae(each, CPU)) for each in (model, other))
    texts = [load_text_parts(each, bf16, CPU) for each in (model, other)]
    pairs = [
        *zip(ours, theirs, strict=True),
        *((texts[0][name], texts[1][name]) for name in ("text_encoder", "text_encoder_2")),
    ]
    for mine, wanted in pairs:
        state = wanted.state_dict()
        assert state.keys() == mine.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in mine.state_dict().items())
    for name in ("tokenizer", "tokenizer_2"):
        assert texts[0][name]("a red star").input_ids == texts[1][name]("a red star").input_ids
    assert dict(load_scheduler(model).config) == dict(load_scheduler(other).config)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert read_config(model, part) == read_config(other, part)
        assert len(fingerprint(model, part)) == 64
    assert ours[0].config["_name_or_path"] == model.path  # and not where the cache is


def test_a_cache_that_hf_download_filled(cache: Path, sharded: Path) -> None:
    fill(cache, "owner/flux", sharded)
    model = Model("owner/flux")
    check_loads(model, sharded)
    assert pipeline_index(model)["_class_name"] == "FluxPipeline"


def test_a_cache_that_a_run_filled_or_another_program(cache: Path, sharded: Path, tmp_path: Path) -> None:
    """Without what stands at the top; of a branch; and of some parts, files that nobody wanted were not downloaded."""
    some = tmp_path / "some"
    shutil.copytree(sharded, some)
    (some / "model_index.json").unlink()
    tree = ["model_index.json", "flux1-dev.safetensors", "vae/diffusion_pytorch_model.bin", "tokenizer/README.md",
            "transformer/diffusion_pytorch_model.fp16.safetensors", "scheduler/other.json"]  # fmt: skip
    fill(cache, "owner/flux", some, "mine", tree)
    check_loads(Model("owner/flux", "mine"), sharded)
    with pytest.raises(ValueError, match=r"cannot load the index of owner/flux: .*check the network"):
        pipeline_index(Model("owner/flux", "mine"))


def test_a_cache_that_lacks_something_is_refused(cache: Path, sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the vae of owner/flux: .*check the network, or download it"):
        load_vae(Model("owner/flux"), CPU)
    snapshot = fill(cache, "owner/flux", sharded)
    model = Model("owner/flux")
    next((snapshot / "transformer").glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"cannot load the transformer of owner/flux: .*check the network"):
        load_transformer(model, Precision("bf16"), CPU)
    next((snapshot / "text_encoder_2").glob("*-00001-*")).unlink()
    with pytest.raises(ValueError, match=r"cannot load the text_encoder_2 of owner/flux: .*check the network"):
        load_text_parts(model, Precision("bf16"), CPU)
    shutil.rmtree(snapshot / "vae")
    with pytest.raises(ValueError, match=r"cannot load the vae of owner/flux: .*check the network"):
        load_vae(model, CPU)
    with pytest.raises(ValueError, match=r"cannot load the scheduler of owner/flux: .*check the network"):
        load_scheduler(Model("owner/flux", "another-branch"))


@pytest.mark.parametrize("name", ["owner/flux", "black-forest-labs/FLUX.1-dev"])
def test_a_checkpoint_in_the_cache_is_saved_quantized(
    name: str, cache: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, name, sharded)
    out = save(Save(Model(name), Precision("nf4"), str(tmp_path / "out"), "cpu"))
    for config in out.rglob("*config.json"):
        text: Any = config.read_text()
        assert str(cache) not in text and not config.is_symlink()
    assert (
        load_transformer(Model(str(out)), Precision("nf4"), CPU).config["num_layers"]
        == read_config(Model(str(sharded)), "transformer")["num_layers"]
    )
    index = json.loads((out / "model_index.json").read_text())
    assert index == json.loads((sharded / "model_index.json").read_text())
