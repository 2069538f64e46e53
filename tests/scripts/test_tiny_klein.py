"""The bundled FLUX.2 klein: what it draws, its sizes, and the demo that trains on its base and draws on both."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from infer.adapter.second import second_model, short_name
from infer.checkpoint.family import distilled_from, distilled_to
from infer.checkpoint.model import Model
from infer.program.paths import CONFIGS, ROOT
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from scripts.tiny import check, klein_text
from scripts.tiny.make_style import make_style
from train.loop.preview import SHEET
from train.run.config import Train
from train.run.names import check_names
from train.train import train

BASE, FEW = (Model(str(ROOT / "scripts" / "tiny" / name)) for name in ("klein", "klein_distilled"))


def job_of(*words: str) -> Train:
    ConfigStore.instance().store(name="train_schema", node=Train)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        job = OmegaConf.to_object(compose("train", list(words)))
    assert isinstance(job, Train)
    return job


@pytest.mark.parametrize(("model", "precision", "steps"), [(BASE, "bf16", 16), (FEW, "nf4", None)])
def test_it_draws_captions_it_never_saw(model: Model, precision: str, steps: int | None) -> None:
    """A quick part of `python scripts/tables.py klein`; docs/bundled-model.md holds the whole figures."""
    captions = check.held_out_captions(8, seed=7)
    shares = check.tally(check.check_model(Path(model.path), captions, steps, None, None, precision))
    assert shares["right"] >= 0.75 and shares["background"] == 1 and shares["inked"] == 0


def test_the_two_differ_by_their_transformers_alone() -> None:
    base, few = (
        {file.relative_to(one.path): file.read_bytes() for file in Path(one.path).rglob("*") if file.is_file()}
        for one in (BASE, FEW)
    )
    for files in (base, few):
        assert not [name for name, content in files.items() if b"_name_or_path" in content], "whose folder it was"
        assert sum(map(len, files.values())) <= 12 * 2**20
    changed = {str(name) for name in base if base[name] != few.get(name)}
    weights = {f"transformer/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    assert base.keys() == few.keys() and changed == weights | {"model_index.json"}


def test_each_is_the_others_base_and_distilled_one() -> None:
    assert distilled_to(BASE) == FEW.path and distilled_from(FEW) == BASE.path
    assert distilled_to(FEW) is None and distilled_from(BASE) is None
    assert (short_name(BASE), short_name(second_model(BASE, "distilled"))) == ("tiny_klein", "tiny_klein_distilled")
    with pytest.raises(ValueError, match=rf"model\.path={BASE.path}\) and draw with either"):
        check_names(job_of("experiment=demo_klein", "model=tiny_klein_distilled", "sampling.model=null"))


def test_a_rounded_copy_of_the_text_encoder_is_what_is_drawn_with() -> None:
    reader = Qwen2Tokenizer.from_pretrained(Path(BASE.path, "tokenizer"))
    encoder = Qwen3ForCausalLM.from_pretrained(Path(BASE.path, "text_encoder"), dtype=torch.float32)
    found = {}
    for kind in ("bf16", "nf4"):
        with text_encoder(BASE, Precision(kind), torch.device("cpu"), None) as encode:
            (text,) = encode(["two red stars"])
        copy = klein_text.stored(encoder, kind).float()
        ids, mask = (torch.from_numpy(each) for each in klein_text.chat(reader, ["two red stars"]))
        with torch.no_grad():
            found[kind] = klein_text.embed(copy, ids, mask)[0], text.embeds.float()
    ours, theirs = found["nf4"]
    apart = (ours - theirs).norm() / theirs.norm()
    rounding = (theirs - found["bf16"][1]).norm() / theirs.norm()
    assert apart < 0.25 * rounding


def test_the_demo_trains_on_the_base_and_draws_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_style(Path("runs/demo-pictures"), 6, 0)
    job = job_of(
        "experiment=demo_klein", "steps=2", "data.batch_size=2", "data.validation=0", "validate_every=0",
        "sampling.steps=2", "device=cpu", "previews=['zelk style, a large red star']",
    )  # fmt: skip
    train(job)
    with Image.open("runs/demo-klein/previews/step-000002.png") as sheet:
        columns = json.loads(sheet.text[SHEET])["columns"]  # type: ignore[attr-defined]
    assert columns == ["base", "adapter", "base on tiny_klein_distilled", "adapter on tiny_klein_distilled"]
