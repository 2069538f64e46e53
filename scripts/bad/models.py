"""Model folders that cannot be used: the bundled one with something damaged, through compare.py."""

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from infer.program.paths import ROOT
from scripts.bad.adapters import Bomb, pair
from scripts.bad.case import Case

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
TINY = ROOT / "scripts" / "tiny" / "model"
DRAW = ["device=cpu", "only=[nf4]", "prompts=[a red star]", "sampling.steps=1", "sampling.height=16", "text_length=8",
        "sampling.width=16", "model.path=model"]  # fmt: skip
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "transformer": "diffusion_pytorch_model-00001-of-00002.safetensors",
}


def copy(folder: Path) -> Path:
    """The bundled model of links to its files, each of which can be replaced."""
    for file in TINY.rglob("*"):
        if file.is_file():
            own = folder / "model" / file.relative_to(TINY)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(file)
    return folder / "model"


def replace(model: Path, name: str, content: bytes | None) -> None:
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)


def one(name: str, damage: Callable[[Path], object], said: str) -> Case:
    def make(folder: Path) -> list[str]:
        damage(copy(folder))
        return DRAW

    return Case("model", name, make, said, "compare")


def part(name: str, file: str, content: bytes | None, said: str) -> Case:
    return one(name, lambda model: replace(model, file, content), said)


def _edit(file: str, change: dict[str, Any], model: Path) -> None:
    config = json.loads((model / file).read_text())
    for key, value in change.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    replace(model, file, json.dumps(config).encode())


def _remove(name: str, model: Path) -> None:
    for file in (model / name).iterdir():
        file.unlink()
    (model / name).rmdir()


def _pickled(part: str, model: Path) -> None:
    """Weights as a pickle only, which would run a program."""
    name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
    for file in (model / part).glob("*.safetensors*"):
        file.unlink()
    (model / part / name).write_bytes(pickle.dumps(Bomb()))


def _remote_code(model: Path) -> None:
    """A tokenizer that brings a program of its own."""
    _edit(
        "tokenizer_2/tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"},
        model,
    )
    (model / "tokenizer_2" / "own.py").write_text("open('runs-partial-code-was-run', 'w').close()\nclass Own: pass\n")


def _single(kind: str) -> dict[str, torch.Tensor]:
    """A single file of the bundled model's transformer, or of what is no such thing."""
    if kind == "sd3":
        return {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2, 2)}
    found = {name: value for file in sorted((TINY / "transformer").glob("*.safetensors")) for name, value in
             load_file(file).items()}  # fmt: skip
    if kind == "half":
        return dict(list(found.items())[: len(found) // 2])
    if kind == "nf4":
        name = "transformer_blocks.0.attn.to_q.weight"
        found |= {name: torch.zeros(10, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4),
                  f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}  # fmt: skip
    return found


def cases() -> Iterator[Case]:
    for name in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"):
        yield one(f"no {name}", partial(_remove, name), f"model lacks the folders {name}")
    for what, content in (("absent", None), ("empty", b""), ("no JSON", b"{"), ("a list", b"[]"), ("null", b"null"),
                          ("no UTF-8", b"\xff\xfe"), ("an empty object", b"{}"),
                          ("of another pipeline", b'{"_class_name": "StableDiffusionPipeline"}')):  # fmt: skip
        yield part(f"model_index.json {what}", "model_index.json", content, "model_index.json")
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer", "scheduler"):
        file = "scheduler/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"
        for what, content in (("absent", None), ("empty", b""), ("no JSON", b"{"), ("a list", b"[]")):
            yield part(f"config of {name} {what}", file, content, f"the {name} of model|model/{name}|{name}")
    for name, file in WEIGHTS.items():
        for what, content in (("absent", None), ("empty", b""), ("text", b"<html>404</html>"),
                              ("a pointer of Git LFS", LFS), ("a header alone", b"\x02\0\0\0\0\0\0\0{}"),
                              ("a header of 2^63 bytes", b"\0\0\0\0\0\0\0\x80{}")):  # fmt: skip
            yield part(f"weights of {name} {what}", f"{name}/{file}", content, f"the {name} of model|model/{name}/")
        yield one(
            f"weights of {name} cut",
            lambda model, name=name, file=file: replace(  # type: ignore[misc]
                model, f"{name}/{file}", (TINY / name / file).read_bytes()[:-1000]
            ),
            f"the {name} of model|model/{name}/",
        )
        yield one(f"weights of {name} as a pickle", partial(_pickled, name), f"the {name} of model|model/{name} ")
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    for what, content in (("absent", None), ("no JSON", b"{"), ("an empty object", b"{}"),
                          ("a map to a file that is not there", b'{"weight_map": {"a": "gone.safetensors"}}'),
                          ("a map that leads out", b'{"weight_map": {"a": "../../x.safetensors"}}')):  # fmt: skip
        yield part(
            f"index of the transformer {what}",
            index,
            content,
            "the transformer of model|model/transformer|transformer: model",
        )
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("transformer", {"num_layers": 9}),
        ("transformer", {"num_attention_heads": 5}),
        ("transformer", {"attention_head_dim": "many"}),
        ("transformer", {"axes_dims_rope": [1, 2, 3]}),
        ("transformer", {"quantization_config": {"quant_method": "magic"}}),
        ("transformer", {"quantization_config": "nf4"}),
        ("text_encoder", {"hidden_size": 48}),
        ("text_encoder_2", {"d_model": 48}),
        ("text_encoder_2", {"num_layers": "two"}),
        ("vae", {"sample_size": None}),
        ("vae", {"sample_size": "large"}),
        ("vae", {"latent_channels": 3}),
        ("vae", {"block_out_channels": [7]}),
    )
    for name, change in changes:
        ((key, value),) = change.items()
        yield one(
            f"{key} of {name} is {value}",
            partial(_edit, f"{name}/config.json", change),
            rf"{name}|{key}|autoencoder gives",
        )
    for name in ("tokenizer", "tokenizer_2"):
        for what, content in (("absent", None), ("empty", b""), ("no JSON", b"{"), ("an empty object", b"{}")):
            yield part(f"{name}.json {what}", f"{name}/tokenizer.json", content, f"the {name} of model")
    yield one("a tokenizer with a program", _remote_code, "the tokenizer_2 of model")
    for name, path, said, *more in (
        ("a file", "model/model_index.json", "is a file of the checkpoint model; set model.path to that folder"),
        ("a part of it", "model/vae", "is a part of the checkpoint model; set model.path to that folder"),
        ("a file of a part", f"model/vae/{WEIGHTS['vae']}", "is a file of the checkpoint model"),
        ("a single file of one layer", "flux1.safetensors", r"holds no transformer of FLUX\.1 and FLUX\.2"),
        ("a GGUF file without tensors", "here/flux1-Q8_0.gguf", "holds no tensors; download it again"),
        ("a GGUF file's folder", "here", "to use a single file in it, set model.path=here/flux1-Q8_0.gguf"),
        ("a pointer of Git LFS", "pointer.safetensors", "pointer of Git LFS .*git lfs pull"),
        ("a file that is not there", "here/flux1.safetensors", "has no such file; there is flux1-Q8_0.gguf; give the"),
        ("a file in no folder", "gone/flux1.safetensors", "is not there, nor is its folder"),
        ("a file of another model", "sd3.safetensors", "Stable Diffusion 3"),
        ("a file of NF4", "nf4.safetensors", "nf4|bitsandbytes|NF4"),
        ("half a file", "half.safetensors", "holds no transformer of|lacks .* of the transformer's tensors"),
        ("a file of other parts", "whole.safetensors", "model.parts", ("model.parts=nowhere/at/all",)),
        ("a file with its encoder elsewhere", "whole.safetensors", "model.text", ("model.text=gone.safetensors",)),
        ("a page of the Hub", "https://huggingface.co/a/b/tree/main", "no folder here and no Hub id .*write a/b"),
        ("a LoRA file", "lora.safetensors", "is a LoRA file; give it as adapter.path"),
        ("in quotes, in a home that holds none", "'~/no-such-folder'", "no folder here and no Hub id"),
        ("a Hub id, offline", "no-one/no-model", "no-one/no-model"),
        ("an absent folder", "./nowhere", "no folder here and no Hub id"),
        ("an address", "https://example.com/a", "no folder here and no Hub id"),
    ):

        def make(folder: Path, path: str = path, more: Any = more) -> list[str]:
            copy(folder)
            (folder / "flux1.safetensors").write_bytes(save({"double_blocks.0.img_attn.qkv.weight": torch.ones(2)}))
            (folder / "lora.safetensors").write_bytes(save(pair()))
            (folder / "pointer.safetensors").write_bytes(LFS)
            (folder / "here").mkdir()
            (folder / "here" / "flux1-Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
            if path in ("sd3.safetensors", "nf4.safetensors", "half.safetensors", "whole.safetensors"):
                (folder / path).write_bytes(save(_single(path.partition(".")[0])))
            return [*DRAW, f"model.path={path}", *(more[0] if more else ())]

        yield Case("model", f"the path is {name}", make, said, "compare")
