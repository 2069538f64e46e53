"""FLUX.2 through the commands: trained, stopped and resumed, previewed, compared, saved and merged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file

from infer.adapter.attach import attach, load_adapter
from infer.adapter.checks import check_running
from infer.adapter.error_init import start_from_error
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.adapter.selection import Trained
from infer.adapter.targets import base_layers
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.family import find, flux2_sizes
from infer.fast.memory import Memory
from infer.merge import merge
from infer.merging.settings import Merge, check_merge
from infer.quantize.precision import Precision
from infer.quantize.quantizer import quantizing_on
from infer.quantize.storage import dequantized, stored_bytes
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling
from infer.save import Save, save
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.estimate.memory import text_bytes, weights_by_module
from train.estimate.plan import Plan, plan
from train.loop.supported import check_flow
from train.objective.flow_matching import Flow
from train.run.config import Train
from train.run.names import check_names
from train.train import train

CPU = torch.device("cpu")
FEW = Sampling(steps=1, height=32, width=32)


@pytest.fixture
def job(klein: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)
    make_style(Path("pictures"), 4, 0)
    return Train(
        model=klein, data=Data(path="pictures", resolution=32, text_length=32, validation=0.25), steps=4, save_every=2,
        validate_every=0, validation_levels=1, previews=["a fox"], sampling=FEW, device="cpu", run="straight",
        adapter=Adapter(rank=4),
    )  # fmt: skip


@pytest.mark.parametrize("products", ["bf16", "fp8"])
def test_a_run_is_resumed_bit_for_bit_and_drawn_compared_and_merged(products: str, job: Train, klein: Model) -> None:
    job = replace(job, precision=Precision("nf4", products=products))
    whole = load_file(train(job) / FILE)
    assert any(value.any() for key, value in whole.items() if "lora_B" in key)
    assert Path("runs/straight/previews/step-000004.png").is_file()  # guidance by two calls
    train(replace(job, run="again", steps=2, previews=[]))
    again = load_file(train(replace(job, run="again", previews=[])) / FILE)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    if products != "bf16":
        return
    options = Compare(
        model=klein, precisions={"nf4": Precision("nf4")}, prompts=["a fox"], sampling=FEW, text_length=32,
        device="cpu", run="straight", adapter=Trained("runs/straight/adapter"),
    )  # fmt: skip
    found = json.loads((compare(options) / "results.json").read_text())
    assert len(found["rows"]) == 2 and found["sampling"]["guidance"] == 4.0
    adapter = Trained("runs/straight/adapter")
    out = merge(Merge(klein, Precision("bf16"), adapter, "merged", device="cpu"))
    merged, base = (load_transformer(Model(path), Precision("bf16"), CPU) for path in (str(out), klein.path))
    name = "single_transformer_blocks.0.attn.to_out"
    down, up = (whole[f"transformer.{name}.lora_{part}.weight"].float() for part in "AB")
    expected = base.get_submodule(name).weight.float() + up @ down
    torch.testing.assert_close(merged.get_submodule(name).weight.float(), expected, rtol=1e-2, atol=1e-4)


def test_a_quantized_folder_gives_plain_diffusers_and_us_the_same_embeddings(klein: Model, tmp_path: Path) -> None:
    folder = save(Save(klein, Precision("nf4"), str(tmp_path / "nf4"), "cpu"))
    with text_encoder(Model(str(folder)), Precision("nf4"), CPU, 32) as encoder:
        (ours,) = encoder(["a fox"])
    with text_encoder(klein, Precision("nf4"), CPU, 32) as encoder:
        (before,) = encoder(["a fox"])
    assert torch.equal(ours.embeds, before.embeds)
    pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, transformer=None, vae=None)
    theirs, _ = pipeline.encode_prompt("a fox", max_sequence_length=32, device=CPU)
    assert (theirs[0].float() - ours.embeds.float()).norm() < 0.02 * ours.embeds.float().norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_plain_diffusers_loads_a_saved_quantized_transformer(kind: str, klein: Model, tmp_path: Path) -> None:
    folder = save(Save(klein, Precision(kind), str(tmp_path / kind), "cpu"))
    file = folder / "transformer" / "config.json"
    stored = json.loads(file.read_text())["quantization_config"]
    assert stored["load_in_4bit" if kind == "nf4" else "load_in_8bit"]
    with quantizing_on(CPU, CPU):  # diffusers asks for a GPU first
        theirs = Flux2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    ours = load_transformer(klein, Precision(kind), CPU)
    for name, layer in base_layers(ours).items():
        assert torch.equal(dequantized(layer), dequantized(theirs.get_submodule(name))), name


def test_training_on_a_distilled_checkpoint_is_refused_with_its_base(job: Train) -> None:
    distilled = Model("black-forest-labs/FLUX.2-klein-9B")
    with pytest.raises(ValueError, match=r"distilled to draw in few steps.*model\.path=.*FLUX\.2-klein-base-9B"):
        check_names(replace(job, model=distilled))
    with pytest.raises(ValueError, match=r"distilled to draw in few steps.*set distilled=true"):
        plan(Plan(model=distilled))
    assert plan(Plan(model=distilled, distilled=True))["blocks"] == 32


@pytest.mark.parametrize("path", ["black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-dev"])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_random_weights_are_what_the_plan_counts(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    sizes = flux2_sizes.SIZES[path]
    encoder = sizes["text_encoder"]
    encoder = encoder | ({"text_config": encoder["text_config"] | small} if "text_config" in encoder else small)
    blocks = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 192}
    changed = sizes | {"transformer": sizes["transformer"] | blocks, "text_encoder": encoder}
    monkeypatch.setitem(find.SIZES, path, changed)
    model, precision = Model(path, weights="random"), Precision(kind)
    with text_encoder(model, precision, CPU, 16) as loaded:
        (text,) = loaded(["a fox"])
    assert text.embeds.shape == (16, 192) and text.embeds.isfinite().all()
    assert loaded.weights_bytes == pytest.approx(text_bytes(model, precision), rel=0.01)
    transformer = load_transformer(model, precision, CPU)
    planned = sum(weights_by_module(changed["transformer"], precision).values())
    assert stored_bytes(transformer) == pytest.approx(planned, rel=1e-6)


def test_options_that_do_not_hold_for_it_are_refused(job: Train, klein: Model) -> None:
    with pytest.raises(ValueError, match=r"flow\.density=shifted follows FLUX\.1-dev's sampler.*another rule"):
        check_flow(klein, Flow(density="shifted"))
    with pytest.raises(ValueError, match=r"distilled is true, but .* is not distilled"):
        check_names(replace(job, distilled=True))
    with pytest.raises(ValueError, match=r"precision\.products=fp8 has no effect on what is merged"):
        check_merge(Merge(klein, Precision("nf4", products="fp8"), Trained("a"), "merged", device="cpu"))


def test_a_layer_that_an_adapter_was_rounded_around_is_found_again(job: Train, klein: Model) -> None:
    """init=loftq: the weights that a loaded adapter stands on are those of its training, bit for bit."""
    job = replace(job, adapter=Adapter(rank=4, init="loftq"), steps=1, previews=[])
    transformer = load_transformer(klein, job.precision, CPU)
    attach(transformer, job.adapter, 0, model=klein)
    start_from_error(transformer, klein, "loftq")
    again = load_transformer(klein, job.precision, CPU)
    load_adapter(again, str(train(job)), "mine", klein)
    for name, layer in base_layers(transformer).items():
        assert torch.equal(dequantized(layer), dequantized(base_layers(again)[name])), name
    options = Trained("runs/straight/adapter")
    with pytest.raises(ValueError, match="init=loftq, around which layers are rounded again, and the scales"):
        check_running(klein, Precision("nf4", products="int8"), options, None, Memory(), CPU)
