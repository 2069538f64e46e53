"""Adapter files that cannot be used, through compare.py, which has to refuse them before it loads a model."""

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from infer.adapter.read import FILE
from scripts.bad.case import Case

LAYER = "transformer.transformer_blocks.0.attn.to_q"
SINGLE = "transformer.single_transformer_blocks.0"
DRAW = ["device=cpu", "only=[bf16]", "prompts=[a red star]", "sampling.steps=1", "sampling.height=16", "text_length=8",
        "sampling.width=16", "adapter.path=bad.safetensors"]  # fmt: skip
UNREAD = r"bad\.safetensors"
MISFIT = r"bad\.safetensors"


@lru_cache
def width() -> int:
    from infer.program.paths import ROOT

    config: dict[str, Any] = json.loads((ROOT / "scripts/tiny/model/transformer/config.json").read_text())
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def pair(layer: str = LAYER, rank: int = 2, inner: int | None = None, outer: int | None = None) -> dict[str, Tensor]:
    """A down and an up projection."""
    return {
        f"{layer}.lora_A.weight": torch.full((rank, inner or width()), 0.01),
        f"{layer}.lora_B.weight": torch.full((outer or width(), rank), 0.01),
    }


def framed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def file(name: str, content: Callable[[], bytes], said: str) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "bad.safetensors").write_bytes(content())
        return DRAW

    return Case("adapter", name, make, said, "compare")


def tensors(name: str, state: Callable[[], dict[str, Tensor]], said: str, notes: dict[str, str] | None = None) -> Case:
    return file(name, lambda: save(state(), metadata=notes), said)


def _changed(**changes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The good pair with its A or B changed."""
    state = pair()
    for part, change in changes.items():
        key = f"{LAYER}.lora_{part}.weight"
        state[key] = change(state[key]).contiguous()
    return state


def _path(name: str, path: str, said: str, prepare: Callable[[Path], object] = lambda _: None) -> Case:
    def make(folder: Path) -> list[str]:
        prepare(folder)
        return [*DRAW, f"adapter.path={path}"]

    return Case("adapter", name, make, said, "compare")


def cases() -> Iterator[Case]:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for name, content in (
        ("empty", b""),
        ("seven bytes", b"1234567"),
        ("a length alone", struct.pack("<Q", 0)),
        ("a header of 2^63 bytes", framed(b"{}", length=2**63)),
        ("a header of 90 MB that is not there", framed(b"{}", length=90_000_000)),
        ("a header one byte too long", framed(b"{}", length=3)),
        ("a header that is no JSON", framed(b"{'a'}")),
        ("a header that is no UTF-8", framed(b"\xff\xfe{}")),
        ("a header that is a list", framed([])),
        ("a header nested too deep", framed(b'{"a":' * 50_000)),
        ("no dtype", framed({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16))),
        ("no shape", framed({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16))),
        ("an unknown dtype", framed({"a": {**entry, "dtype": "F31"}}, bytes(16))),
        ("a shape of another size", framed({"a": {**entry, "shape": [2, 3]}}, bytes(16))),
        ("a shape of 2^62 numbers", framed({"a": {**entry, "shape": [2**31, 2**31]}}, bytes(16))),
        ("a negative shape", framed({"a": {**entry, "shape": [-2, -2]}}, bytes(16))),
        ("offsets beyond the end", framed({"a": {**entry, "data_offsets": [0, 160]}}, bytes(16))),
        ("offsets backwards", framed({"a": {**entry, "data_offsets": [16, 0]}}, bytes(16))),
        ("offsets that overlap", framed({"a": entry, "b": {**entry, "data_offsets": [8, 24]}}, bytes(24))),
        ("a gap between tensors", framed({"a": entry, "b": {**entry, "data_offsets": [20, 36]}}, bytes(36))),
        ("bytes after the end", framed({"a": entry}, bytes(20))),
        ("notes that are numbers", framed({"__metadata__": {"a": 1}, "b": entry}, bytes(16))),
        ("text", b"this is not an adapter at all"),
        ("a pickle", pickle.dumps({"a": 1})),
        ("a ZIP archive", b"PK\x03\x04" + bytes(200)),
        ("an error page", b"<html>404</html>"),
        ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"),
    ):
        yield file(name, lambda content=content: content, UNREAD)  # type: ignore[misc]
    yield file("cut in the data", lambda: save(pair())[:-9], UNREAD)
    yield file("cut in the header", lambda: save(pair())[:60], UNREAD)
    yield file("two adapters in a row", lambda: save(pair()) * 2, UNREAD)

    nan, infinite = float("nan"), float("inf")
    yield tensors("no tensors", dict, MISFIT)
    yield tensors("NaN in A", lambda: _changed(A=lambda t: t * nan), "is not finite in 1 tensors")
    yield tensors("NaN in B", lambda: _changed(B=lambda t: t * nan), "is not finite in 1 tensors")
    yield tensors("infinite", lambda: _changed(B=lambda t: t * infinite), "is not finite in 1 tensors")
    yield tensors("zero", lambda: _changed(B=lambda t: t * 0), "is zero in every layer")
    yield tensors("zero in A", lambda: _changed(A=lambda t: t * 0), "is zero in every layer")
    yield tensors("A alone", lambda: {k: v for k, v in pair().items() if "A" in k}, MISFIT)
    yield tensors("B alone", lambda: {k: v for k, v in pair().items() if "B" in k}, MISFIT)
    yield tensors("ranks that differ", lambda: _changed(A=lambda t: t[:1]), MISFIT)
    yield tensors("rank 0", lambda: pair(rank=0), "are no pair of one rank")
    yield tensors("transposed", lambda: _changed(A=lambda t: t.T, B=lambda t: t.T), MISFIT)
    yield tensors("of a wider model", lambda: pair(inner=3072, outer=3072), MISFIT)
    yield tensors("A of a wider model", lambda: pair(inner=3072), MISFIT)
    yield tensors("B of a wider model", lambda: pair(outer=3072), MISFIT)
    yield tensors("one dimension", lambda: _changed(A=lambda t: t.flatten()), MISFIT)
    yield tensors("three dimensions", lambda: _changed(B=lambda t: t[None]), MISFIT)
    yield tensors("no dimension", lambda: _changed(B=lambda t: t[0, 0]), MISFIT)
    yield tensors("whole numbers", lambda: _changed(A=lambda t: t.int() + 1, B=lambda t: t.int() + 1), MISFIT)
    yield tensors("truth values", lambda: _changed(A=lambda t: t > 0, B=lambda t: t > 0), MISFIT)
    yield tensors("complex numbers", lambda: _changed(B=lambda t: t.to(torch.complex64)), MISFIT)
    for name, layer in (
        ("a layer that is not there", "transformer.transformer_blocks.99.attn.to_q"),
        ("a block that is not there", "transformer.other_blocks.0.attn.to_q"),
        ("a norm, which is no linear layer", "transformer.transformer_blocks.0.norm1.norm"),
        ("of a UNet", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("of a text encoder", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        ("PEFT's own prefix", "base_model.model.transformer_blocks.0.attn.to_q"),
        ("ComfyUI's prefix", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("a name that leads out", "transformer.../../etc/passwd"),
        ("an empty name", "transformer."),
    ):
        yield tensors(name, lambda layer=layer: pair(layer), MISFIT)  # type: ignore[misc]
    for name, key, said in (
        ("a factor of LoKr beside LoRA", "lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "has no lokr_w2_a"),
        ("embeddings of words", "bundle_emb.sks.t5", "embeddings of words of its own"),
        ("a factor of LoHa beside LoRA", "diffusion_model.single_blocks.0.linear1.hada_w1_a", "has no hada_w"),
        ("OFT of LyCORIS, of outputs", "lycoris_transformer_blocks_0_attn_to_q.oft_blocks", "OFT of outputs"),
        ("LoKr of Tucker's form", "lycoris_transformer_blocks_0_attn_to_q.lokr_t2", "three factors"),
        ("of FLUX.3", "diffusion_model.content_mode_blocks.0.q_proj.lora_A.weight", "is for FLUX.3"),
        ("fp8 with scales", f"{LAYER}.scale_weight", "fp8 numbers have scales of their own"),
        ("another adapter's name", f"{LAYER}.lora_A.second.weight", "holds several adapters"),
        ("DiffSynth-Studio's", "blocks.0.attn.a_to_qkv.lora_A.default.weight", "DiffSynth-Studio's own names"),
    ):
        yield tensors(name, lambda key=key: pair() | {key: torch.ones(2, 2)}, rf"bad\.safetensors .*{said}")  # type: ignore[misc]
    linear1, wide = "diffusion_model.single_blocks.0.linear1", r"maps 256 to .* features where"
    for name, state, said in (
        (
            "of FLUX.2, by diffusers' names",
            lambda: pair(f"{SINGLE}.attn.to_out", inner=4 * width()),
            "it is for FLUX.2",
        ),
        ("of FLUX.2, by ComfyUI's names", lambda: pair(linear1, outer=9 * width()), "it is for FLUX.2"),
        ("of FLUX.2 beside FLUX.1", lambda: pair(f"{SINGLE}.attn.to_out") | pair(f"{SINGLE}.proj_out"), "mixes two"),
        (
            "of FLUX.2-klein-4B",
            lambda: pair(linear1, 2, 3072, 9 * 3072),
            r"fits black-forest-labs/FLUX\.2-klein-base-4B",
        ),
        ("of no model's sizes", lambda: pair(linear1, outer=8 * width()), "does not fit any model at single_blocks.0"),
        ("time_in of another size", lambda: pair("diffusion_model.time_in.in_layer", outer=9), wide),
    ):
        yield tensors(name, state, rf"bad\.safetensors .*{said}")
    own = f"{LAYER}.oft_R.weight"
    for name, state, said in (
        ("OFT beside LoRA", lambda: pair() | {own: torch.ones(32, 28)}, "has LoRA and OFT for"),
        ("OFT of no block", lambda: {own: torch.ones(32, 27)}, "27 numbers a block, which no block has"),
        ("OFT of a wider model", lambda: {own: torch.ones(384, 28)}, "its OFT is for 3072 features where"),
        ("OFT that turns nothing", lambda: {own: torch.zeros(32, 28)}, "is zero in every layer"),
        ("OFT of three dimensions", lambda: {own: torch.ones(32, 28, 1)}, "and is no matrix"),
        ("OFT of an unknown layer", lambda: {"transformer.nowhere.oft_R.weight": torch.ones(32, 28)}, "are unknown"),
    ):
        yield tensors(name, state, rf"bad\.safetensors .*{said}|bad\.safetensors: .*{said}")
    for name, words, said in (
        ("OFT at a strength", ["adapter.weight=0.5"], "whose turn has no strength: .*not 0.5"),
        ("OFT beside another", ["adapter.also=[{path:bad.safetensors}]"], "no other adapter can be beside it"),
        ("OFT where a setting needs the fast path", ["memory.compile=true"], "it has no adapters of kind oft"),
    ):

        def turned(folder: Path, words: list[str] = words) -> list[str]:
            (folder / "bad.safetensors").write_bytes(save({own: torch.full((width() // 8, 28), 0.01)}))
            return [*DRAW, "adapter.path=bad.safetensors", *words]

        yield Case("adapter", name, turned, said, "compare")
    yield tensors("a checkpoint", lambda: {f"{LAYER}.weight": torch.ones(2, 2)}, "is a checkpoint and no adapter")
    yield tensors("kohya's names of too few rows", lambda: {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, width()),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(2 * width(), 4),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0)}, MISFIT)  # fmt: skip
    yield tensors("weights of a whole model", lambda: {f"{LAYER}.weight": torch.ones(4, 4)}, MISFIT)
    yield tensors("alpha alone", lambda: {f"{LAYER}.alpha": torch.tensor(4.0)}, MISFIT)
    yield tensors("a good layer and an unknown one", lambda: pair() | pair("transformer.nowhere"), MISFIT)
    notes = {"lora_adapter_metadata": "{"}
    yield tensors("diffusers' notes that are no JSON", pair, UNREAD, notes)
    notes = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ["many"]})}
    yield tensors("diffusers' notes of a wrong type", pair, MISFIT, notes)

    yield _path("a path that is not there", "nowhere", "no adapter at nowhere")
    yield _path("an empty folder", "void", "no adapter at void", lambda f: (f / "void").mkdir())
    yield _path("a folder with other files", "some", f"no adapter at some/{FILE}", _other)
    yield _path(
        "a folder named as a file",
        "f.safetensors",
        "no adapter at f.safetensors",
        lambda f: (f / "f.safetensors").mkdir(),
    )
    yield _path(
        "a link to nowhere",
        "l.safetensors",
        "no adapter at l.safetensors",
        lambda f: (f / "l.safetensors").symlink_to("gone"),
    )
    yield _path("a pickled adapter", "bad.bin", "bad.bin", lambda f: (f / "bad.bin").write_bytes(_bomb(f)))
    yield _path("a pickled checkpoint", "bad.ckpt", "bad.ckpt", lambda f: torch.save(pair(), f / "bad.ckpt"))


def _other(folder: Path) -> None:
    (folder / "some").mkdir()
    (folder / "some" / "adapter_model.bin").write_bytes(b"")


class Bomb:
    """A pickle that would write a file if anything read it."""

    def __reduce__(self) -> Any:
        return (exec, ("open('runs-partial-pickle-was-run', 'w').close()",))


def _bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb())
