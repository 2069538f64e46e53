"""Every setting that is a path: ~, names that could be the Hub's, and files where something else is wanted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infer.adapter.lora import Adapter
from infer.adapter.read import find_adapter
from infer.adapter.selection import Trained, Weighted
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.comparison.settings import Compare
from infer.convert import Convert, Source
from infer.merging.settings import Merge
from infer.program.paths import is_hub_id, kind_of_file
from infer.quantize.precision import Precision
from infer.rounding.settings import Sensitivity
from infer.save import Save
from infer.score.judges import list_pictures
from infer.score.networks import Networks, check_networks
from train.data.dataset import Data, Prior
from train.data.hf_table import is_table
from train.data.samples import read_samples
from train.data.source import Source as Pictures


def drawing(**options: Any) -> Compare:
    return Compare(precisions={"a": Precision("nf4")}, prompts=["a"], **options)


PATHS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "model.path": (lambda path: Model(path), lambda o: o.path),
    "model.parts": (lambda path: Model(__file__, parts=path), lambda o: o.parts),
    "adapter.start": (lambda path: Adapter(start=path), lambda o: o.start),
    "adapter.recovery": (lambda path: Adapter(recovery=path), lambda o: o.recovery),
    "adapter.path": (lambda path: Trained(path), lambda o: o.path),
    "adapter.also": (lambda path: Trained("a", also=[Weighted(path)]), lambda o: o.also[0].path),
    "adapter.path of convert": (lambda path: Source(path), lambda o: o.path),
    "recovery": (lambda path: drawing(recovery={"a": path}), lambda o: o.recovery["a"]),
    "references": (lambda path: drawing(references=path), lambda o: o.references),
    "data.path": (lambda path: Data(path), lambda o: o.path),
    "data.masks": (lambda path: Data("a", masks=path), lambda o: o.masks),
    "data.cache": (lambda path: Data(cache=path), lambda o: o.cache),
    "data.prior.path": (lambda path: Data(prior=Prior(path)), lambda o: o.prior.path),
    "data.sources": (lambda path: Data(sources=[Pictures(path)]), lambda o: o.sources[0].path),
    "masks of a source": (lambda path: Pictures("a", masks=path), lambda o: o.masks),
    "networks.clip": (lambda path: Networks(clip=path), lambda o: o.clip),
    "networks.dino": (lambda path: Networks(dino=path), lambda o: o.dino),
    "networks.lpips": (lambda path: Networks(lpips=path), lambda o: o.lpips),
    "out of save": (lambda path: Save(out=path), lambda o: o.out),
    "out of convert": (lambda path: Convert(out=path), lambda o: o.out),
    "out of merge": (lambda path: Merge(out=path), lambda o: o.out),
    "out of sensitivity": (lambda path: Sensitivity(out=path, budget_gib=1), lambda o: o.out),
}  # fmt: skip


@pytest.mark.parametrize("setting", PATHS)
def test_a_tilde_is_the_home_folder(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    make, read = PATHS[setting]
    assert read(make("~/deep/set")) == str(tmp_path / "home" / "deep" / "set")
    assert read(make("set/~")) == "set/~" and read(make("~no-such-user/a")) == "~no-such-user/a"
    (tmp_path / "~mine").mkdir()
    assert read(make("~mine")) == "~mine"
    if setting not in ("model.path", "data.sources"):
        assert read(replace(make("~/a"))) == str(tmp_path / "home" / "a")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("black-forest-labs/FLUX.1-dev", True), ("a/b", True), ("me/set_1.0", True), ("city96/FLUX.1-dev-gguf", True),
     ("a", False), ("a/b/c", False), ("./a", False), ("../a", False), ("/a/b", False), ("~/a", False), ("a/", False),
     ("my pictures/dogs", False), ("läufe/hund", False), ("models/flux1-dev.safetensors", False), ("a/b.GGUF", False),
     ("sets/dogs.zip", False), ("sets/a.png", False), ("", False), ("https://huggingface.co/a/b", False)],
)  # fmt: skip
def test_what_a_hub_id_is(name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) == is_table(name) == is_one
    if is_one:  # not where something of that name is here, whatever it is
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        assert not is_hub_id(name) and not is_table(name)


def put(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2) for name in names}, file)
    return file


def test_files_for_a_model(tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "models" / "flux1-dev.safetensors", "double_blocks.0.img_attn.qkv.weight")
    put(tmp_path / "models" / "all.sft", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.a")
    put(tmp_path / "models" / "lora.safetensors", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight")
    (tmp_path / "models" / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    torch.save({"a": torch.ones(2)}, tmp_path / "models" / "flux.ckpt")
    (tmp_path / "models" / "notes").write_text("hello")
    whole = Path(tiny.path).resolve()
    for path, said in (
        ("models/flux1-dev.safetensors", r"holds no transformer of FLUX\.1 and FLUX\.2"),
        (str(tmp_path / "models" / "all.sft"), r"holds no transformer of FLUX\.1 and FLUX\.2"),
        ("models/flux.ckpt", "is a pickled checkpoint, which may run any program .*; give the model as safetensors"),
        ("models/flux1-dev-Q4_K_S.gguf", r"holds no tensors; download it again|cannot read"),
        ("models/lora.safetensors", "is a LoRA file; give it as adapter.path"),
        ("models/notes", "is a file and no checkpoint"),
        (str(whole / "model_index.json"), f"is a file of the checkpoint {whole}; set model.path to that folder"),
        (str(next((whole / "vae").glob("*.safetensors"))), f"is a file of the checkpoint {whole}; set"),
        (str(whole / "transformer"), f"is a part of the checkpoint {whole}; set model.path to that folder"),
        (
            str(whole.parent),
            "holds no model_index.json, but folders in it do: klein, klein_distilled, model; set model.path to one",
        ),
        (
            "models/gone.safetensors",
            r"'models/gone.safetensors' is not there: .* has no such file; there are all.sft, flux1-dev",
        ),
        ("gone/gone.gguf", r"'gone/gone.gguf' is not there, nor is its folder .*gone; "),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev/tree/main", "; write black-forest-labs/FLUX.1-dev"),
        ("huggingface.co/black-forest-labs/FLUX.1-dev", "; write black-forest-labs/FLUX.1-dev"),
        ("my models/flux", "no folder here and no Hub id"),
        ("models", r"holds no model_index.json.* set model\.path=models/all\.sft \(docs/files\.md\)"),
    ):
        with pytest.raises(ValueError, match=said):
            check_model(Model(path))
    for name, said in (("flux1-dev-Q4_K_S.gguf", r"set model\.path=.*gguf"), ("lora.safetensors", "holds a LoRA file")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (tmp_path / "models" / name).rename(folder / name)
        with pytest.raises(ValueError, match=said):
            check_model(Model(str(folder)))
    cached = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    (cached / "snapshots").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is the Hub's cache of .*; set model\.path=black-forest-labs/FLUX\.1-dev"):
        check_model(Model(str(cached)))


def test_files_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name, content in (
        ("a.PNG", b""),
        ("metadata.jsonl", b"{}"),
        ("dogs.zip", b"PK\3\4aaaa"),
        ("dogs.tar.gz", b"\x1f\x8b" + bytes(9)),
        ("b", b""),
    ):
        (tmp_path / "set" / name).write_bytes(content)
    for path, said in (
        ("set/a.PNG", "data.path 'set/a.PNG' is a picture; set it to the folder that holds it with its caption, 'set'"),
        ("set/metadata.jsonl", "is the list of captions; set it to its folder, 'set'"),
        ("set/dogs.zip", "is an archive; unpack it"),
        ("set/dogs.tar.gz", "is an archive; unpack it"),
        ("set/b", "is a file of a kind that is not read"),
        ("set/gone.zip", "data.path 'set/gone.zip' does not exist"),
        ("my pictures/dogs", "data.path 'my pictures/dogs' does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            read_samples(Data(path))
        if "data.path" in said:
            with pytest.raises(ValueError, match=said.replace("data.path", "a source's path")):
                read_samples(Data(sources=[Pictures(path)]))
    with pytest.raises(ValueError, match=r"references is 'set/a.PNG', a file; give the folder"):
        list_pictures("set/a.PNG")


def test_files_for_networks_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "clip" / "model.safetensors", "a")
    for networks in (Networks(clip="clip/model.safetensors"), Networks(dino="clip/model.safetensors")):
        with pytest.raises(ValueError, match=r"is 'clip/model.safetensors', a file; give the folder of transformers'"):
            check_networks(networks)
    with pytest.raises(ValueError, match=r"no folder here and no Hub id .*write openai/clip-vit-large-patch14"):
        check_networks(Networks(clip="https://huggingface.co/openai/clip-vit-large-patch14"))
    lora = put(tmp_path / "loras" / "a.safetensors", "a")  # one slash, and here
    assert find_adapter("loras/a.safetensors").resolve() == lora


def test_kinds_of_files_that_are_cut(tmp_path: Path) -> None:
    whole = put(tmp_path / "a.safetensors", "x.lora_A.weight").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert kind_of_file(tmp_path / "cut") in (("other", "adapter") if length else ("empty",))
    header = json.dumps(["double_blocks.0"]).encode()
    for content in (b"\xff" * 8, len(header).to_bytes(8, "little") + header, b"\2" + bytes(7) + b"{}", b"\x80\x04"):
        (tmp_path / "cut").write_bytes(content)
        assert kind_of_file(tmp_path / "cut") in ("other", "flux", "safetensors", "pickle")
    assert kind_of_file(tmp_path / "gone") == kind_of_file(tmp_path) == "other"
