"""The model card as the Hub reads it, and the way to the Hub, against one that is made up."""

import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image, ImageFont

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter as LoRA
from infer.adapter.model_card import Card, push, write_card
from infer.adapter.read import FILE
from infer.checkpoint import hub
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_config
from infer.comparison.settings import Compare
from infer.family.family import Text
from infer.program.literal import literal_arguments
from infer.program.paths import CONFIGS
from infer.quantize.precision import Precision
from infer.sample import sheet as sheets
from infer.sample.generate import Sampling
from train.data.dataset import Data
from train.data.source import Sample
from train.loop import preview as previews
from train.loop.loss_picture import draw_loss, loss_lines
from train.loop.model_card import card_of
from train.loop.next_steps import compare_command, next_steps
from train.run.config import Train

CARD = Card(
    name="mine", base="black-forest-labs/FLUX.1-dev", pipeline="FluxPipeline", trigger="sks: a 'dog'", precision="nf4",
    facts={"kind": "LoRA, rank 4"}, figures={"0": 0.93812, "100": 0.2}, samples={"sks, on a table": "sample-0.png"},
    notes=["Keep dry."],
)  # fmt: skip


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    card = ModelCard.load(write_card(tmp_path, CARD))
    data = card.data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-dev" and data["instance_prompt"] == "sks: a 'dog'"
    assert data["license"] == "other" and data["license_name"] == "flux-1-dev-non-commercial-license"
    assert data["widget"] == [{"text": "sks, on a table", "output": {"url": "sample-0.png"}}]
    assert data["library_name"] == "diffusers" and "lora" in data["tags"]
    for part in ("0.9381 at step 0, 0.2000 at step 100", "| kind | LoRA, rank 4 |", "Keep dry.", "(sample-0.png)"):
        assert part in card.text
    local = tmp_path / "owner" / "model"
    local.mkdir(parents=True)
    card = ModelCard.load(write_card(tmp_path, Card("x", str(local), "FluxPipeline", None, "bf16", {})))
    assert "base_model" not in card.data.to_dict() and str(tmp_path) not in card.content  # no path of this machine


BASES = {  # a base model, the licence and tag of its family, and the few-step checkpoint that it is drawn on too
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux-1-dev-non-commercial-license", "flux", None),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", "flux", None),
    "black-forest-labs/FLUX.2-klein-base-4B": ("apache-2.0", "flux2", "black-forest-labs/FLUX.2-klein-4B"),
    "black-forest-labs/FLUX.2-klein-base-9B": (
        "flux-non-commercial-license", "flux2", "black-forest-labs/FLUX.2-klein-9B",
    ),
    "black-forest-labs/FLUX.2-klein-4B": ("apache-2.0", "flux2", None),
    "black-forest-labs/FLUX.2-dev": ("flux-non-commercial-license", "flux2", None),
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_the_card_draws_with_its_bases_own_pipeline(base: str, tmp_path: Path) -> None:
    licence, tag, few = BASES[base]
    job = Train(run="mine", model=Model(base, weights="random"), steps=1)
    card = ModelCard.load(write_card(tmp_path, card_of(job, tmp_path, {})))
    data = card.data.to_dict()
    assert licence in (data["license"], data.get("license_name")) and tag in data["tags"]
    snippets = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)
    loaded = [re.search(r"= (\w+)\.from_pretrained\(\"(.+?)\"", snippet) for snippet in snippets]
    index = shape_config(base, "index")
    for found, path in zip(loaded, [base, few] if few else [base], strict=True):
        assert found and found[1] == index["_class_name"] and found[2] == path
        assert hasattr(getattr(diffusers, found[1]), "load_lora_weights")
    for snippet in snippets:
        compile(snippet, base, "exec")
    assert ("num_inference_steps=4, guidance_scale=1)" in card.text) == (few is not None)


class Hub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        return f"hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_push_is_private_and_says_what_the_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    for name, message in (("mine", "push is 'mine'; write owner/name"), ("me/mine", "there is no adapter in")):
        with pytest.raises(ValueError, match=message):
            push(tmp_path, name)
    assert not hub.calls
    (tmp_path / FILE).write_bytes(b"")
    assert push(tmp_path, "me/mine") == "hub/me/mine"
    assert hub.calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert hub.calls[1][1]["repo_id"] == "me/mine" and hub.calls[1][1]["folder_path"] == tmp_path

    def refuse(**options: Any) -> None:
        raise HfHubHTTPError(
            "403 Forbidden\nlong story", response=httpx.Response(403, request=httpx.Request("PUT", "hub:"))
        )

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(ValueError, match=r"the Hub did not take me/mine: 403 Forbidden; log in with `hf auth login`"):
        push(tmp_path, "me/mine")


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (32, 80)])
@pytest.mark.parametrize("averaged", [False, True])
def test_samples_are_the_adapters_pictures_pixel_for_pixel(
    size: tuple[int, int], averaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ["adapter"]

    @contextmanager
    def use(name: str) -> Iterator[None]:
        weights.append(name)
        yield
        weights.pop()

    def picture(prompt: str, name: str) -> Image.Image:
        """Every pixel is another, and another for each prompt and each of the weights."""
        height, width = size
        noise = torch.Generator().manual_seed(sum(map(ord, prompt + name)))
        pixels = torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    monkeypatch.setattr(previews, "load_scheduler", lambda model: None)
    monkeypatch.setattr(previews, "load_vae", lambda model, device: None)
    monkeypatch.setattr(previews, "without_adapter", lambda transformer: use("base"))
    monkeypatch.setattr(previews, "draw", lambda transformer, scheduler, text, *rest: (text.embeds, weights[-1]))
    monkeypatch.setattr(previews, "decode", lambda vae, drawn, *size: picture(*drawn))
    prompts = ["a cup", "a long prompt that\nneeds\nthree lines", "a cup", "a dog", 'of {"a": [1]} and ünïcode'] * 2
    cached: Any = {prompt: Text(prompt, None) for prompt in prompts}  # type: ignore[arg-type]  # what the run has of each text, one for both of two equals
    sheet, folder = tmp_path / "previews" / "step-000010.png", tmp_path / "adapter"
    folder.mkdir()
    (folder / "sample-9.png").write_bytes(b"of an earlier card that showed ten prompts")
    device: Any = torch.device("cpu")
    model: Any = Model("owner/name")
    after = use("averaged") if averaged else None
    shown = previews.preview(None, model, cached, Sampling(), size, 0, device, sheet, True, after)  # type: ignore[arg-type]
    samples = previews.samples_of(sheet, folder)
    assert list(samples) == list(cached) == [prompt for prompt, _ in shown] and len(samples) == 4
    for prompt, name in samples.items():
        with Image.open(folder / name) as cut:
            assert cut.convert("RGB").tobytes() == picture(prompt, "adapter").tobytes()
    assert {file.name for file in folder.iterdir()} == {f"sample-{i}.png" for i in range(4)}
    columns = ["base", "adapter", *(["averaged"] if averaged else [])]
    layout = previews.Layout(list(cached), columns, size)
    scale = -(-256 // size[1])  # small pictures are enlarged by a whole number
    with Image.open(sheet) as board:
        assert board.size == (layout.right, layout.top(4)) and layout.right == len(columns) * size[1] * scale
        for row, prompt in enumerate(cached):
            for column, name in enumerate(columns):
                cut = board.convert("RGB").crop(layout.cell(row, column))
                whole = picture(prompt, name).resize((size[1] * scale, size[0] * scale), Image.Resampling.NEAREST)
                assert cut.tobytes() == whole.tobytes()
    base: dict[str, Any] = {}
    drawn: list[str] = []
    monkeypatch.setattr(
        previews, "draw", lambda t, s, text, *_: drawn.append(weights[-1]) or (text.embeds, weights[-1])
    )
    monkeypatch.setattr(previews, "nullcontext", lambda: use("adapter"))
    for _ in range(2):  # the base is drawn once in a run
        previews.preview(None, model, cached, Sampling(), size, 0, device, sheet, True, None, base)  # type: ignore[arg-type]
    assert drawn == ["base"] * 4 + ["adapter"] * 8
    board.copy().save(tmp_path / "older.png")
    assert previews.samples_of(tmp_path / "older.png", folder) == {}  # one that does not say what it shows


@pytest.mark.parametrize("room", [40, 248, 2000])
def test_prompts_stand_whole_above_their_pictures(room: int) -> None:
    font = ImageFont.load_default(sheets.LETTERS)
    for text in ("a cup", "sks, a very small cup on a table beside an extraordinarilylongwordindeed", "", "ü" * 300):
        lines = sheets.wrapped(text, room)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(font.getlength(line) <= room or len(line) == 1 for line in lines)


def test_prompts_of_the_previews_where_none_are_given(tmp_path: Path) -> None:
    data = Data(str(tmp_path), trigger="sks")
    every = [Sample(f"{i}.png", (f"thing {i // 2}",), 0, bytes) for i in range(8)]
    held_out = previews.Samples(every, [0, 1, 2, 3], [7, 6, 5, 4])
    assert list(previews.default_previews(held_out, data)) == ["sks, thing 3", "sks, thing 2"]
    assert list(previews.default_previews(previews.Samples(every, [0, 1], []), data)) == ["sks, thing 0"]


@pytest.mark.parametrize(
    "words, command",
    [
        (["model=dev", "run=mine"], ["model=dev", "run=mine", "adapter.path=runs/mine/adapter", "only=[nf4]"]),
        (["run=a b", "precision=bf16"], ["model=tiny", "run=a b", "adapter.path=runs/a b/adapter", "only=[bf16]"]),
        (["model=klein4b", "run=k", "precision.products=fp8", "precision.t5=int8", "sampling.model=distilled"],
         ["model=klein4b", "run=k", "adapter.path=runs/k/adapter", "only=[nf4]", "precisions.nf4.products=fp8",
          "precisions.nf4.t5=int8", "sampling.model=distilled"]),
        (["model.path=o/x", "precision=fp32"], ["model.path=o/x", "run=train", "adapter.path=runs/train/adapter"]),
    ],
)  # fmt: skip
def test_the_command_that_draws_is_one(words: list[str], command: list[str]) -> None:
    def composed(name: str, schema: Any, words: list[str]) -> Any:
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            found = OmegaConf.to_object(compose(name, literal_arguments(words, schema)))
        GlobalHydra.instance().clear()
        return found

    job = composed("train", Train, words)
    prompt = 'sks, a "cup" on it\'s table'
    said = shlex.split(compare_command(job, Path("runs") / job.run, [prompt, "another"]))
    assert said[:2] == ["python", "infer/compare.py"] and said[2:-1] == command
    options = composed("compare", Compare, said[2:])
    assert options.prompts == [prompt] and options.model.path == job.model.path
    text = next_steps(job, Path("runs") / job.run, [prompt])
    assert [line.split()[0] for line in text.splitlines()] == [
        "next:",
        "look:",
        "draw:",
        "ComfyUI:",
        "diffusers:",
        "share:",
    ]


def test_the_loss_as_a_picture(tmp_path: Path) -> None:
    events: list[dict[str, float]] = [{"step": step, "loss": 1 / step} for step in range(1, 121)]
    events += [{"step": 0, "validation_loss": 2.0}, {"step": 120, "validation_loss": 1.0}]
    lines = loss_lines(events)
    assert lines is not None and loss_lines([{"step": 0, "validation_loss": 1.0}]) is None
    training, held_out = lines.series
    means = [estimate.mean for estimate in training.values if estimate is not None]
    assert means == pytest.approx([np.mean([1 / i for i in range(first, first + 3)]) for first in range(1, 121, 3)])
    assert [v.mean for v in held_out.values if v is not None] == [2.0, 1.0]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    draw_loss(SimpleNamespace(main=True, folder=tmp_path))  # type: ignore[arg-type]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (792, 633) and len(picture.convert("RGB").getcolors(2**20) or []) > 20


def test_the_snippet_of_the_card_runs_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model, recwarn: pytest.WarningsRecorder
) -> None:
    """In a plain diffusers, with the base's folder filled in, which a card of a local base does not say."""
    monkeypatch.chdir(tmp_path)
    transformer = load_transformer(tiny, Precision("bf16"), torch.device("cpu"))
    attach(transformer, LoRA(rank=2), seed=0)
    save_adapter(transformer, Path("runs/mine/adapter"), {})
    card = write_card(Path("runs/mine/adapter"), replace(CARD, base=tiny.path, place="runs/mine/adapter"))
    code = card.read_text().split("```python\n")[1].split("```")[0].replace("the base model's folder", tiny.path)
    assert 'pipeline("sks, on a table")' in code
    draw = FluxPipeline.__call__
    monkeypatch.setattr(FluxPipeline, "__call__", partialmethod(draw, num_inference_steps=1, height=64, width=64))
    recwarn.clear()
    exec(compile(code, "card", "exec"), {})
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)
    ours = [str(warning.message) for warning in recwarn if "torch_dtype" not in str(warning.message)]
    assert ours == []


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.reachable.cache_clear()
    hub.hub_part.cache_clear()
    began = time.monotonic()
    for look in (
        lambda: hub.hub_part("no-one/nothing", None, "vae"),
        lambda: hub.hub_file("no-one/nothing", None, "x"),
    ):
        with pytest.raises(ConnectionError, match="the Hub cannot be reached, and it is not in the Hub's cache here"):
            look()
    assert time.monotonic() - began < hub.WAIT + 5
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})  # the library is left to find out
    hub.reachable.cache_clear()
    assert hub.reachable()
    hub.reachable.cache_clear()
