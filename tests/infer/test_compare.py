"""The comparison on the bundled model, against plain diffusers and figures worked out by hand."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.error_init import save_start
from infer.adapter.lora import Adapter
from infer.adapter.read import read_pairs
from infer.adapter.selection import Trained
from infer.checkpoint.family import latent_map
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.device.measure import measure
from infer.family.packing import pack, unpack
from infer.fast.install import Memory
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from infer.sample.encode import decode, text_encoder, to_posterior
from infer.sample.generate import Sampling, draw, noise
from scripts.tiny import world

CPU = torch.device("cpu")
PROMPT = "a large red star in the middle on a sky background"


@pytest.fixture
def options(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    monkeypatch.chdir(tmp_path)
    return Compare(
        model=tiny,
        precisions={kind: Precision(kind) for kind in ("bf16", "int8", "nf4")},
        prompts=[PROMPT, "two blue circles on a cream background"],
        seeds=[3],
        sampling=Sampling(steps=3, height=128, width=128),  # it was trained at 128 too
        scores={"right": "scripts.tiny.check.right"},
        run="test",
        device="cpu",
    )


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture, dtype=np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * math.log10(255) - 10 * math.log10(((a - b) ** 2).mean())


def test_rows_pictures_and_scores(options: Compare, tmp_path: Path) -> None:
    transformer = load_transformer(options.model, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=4, alpha=9), seed=0):
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(transformer, tmp_path / "lora", {})
    folder = compare(replace(options, adapter=Trained(str(tmp_path / "lora"), "mine")))
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.png", "images", "report.html", "report.md", "results.json"
    ]  # fmt: skip
    result = json.loads((folder / "results.json").read_text())
    rows = result["rows"]
    assert [(r["precision"], r["adapter"]) for r in rows[::2]] == [
        (kind, name) for kind in ("bf16", "int8", "nf4") for name in (None, "mine")
    ]
    size = {(r["precision"], r["adapter"]): r["weights_bytes"] for r in rows}
    assert size["nf4", None] < size["int8", None] < size["bf16", None] < size["bf16", "mine"]
    by_place = {(r["precision"], r["adapter"], r["prompt"]): r for r in rows}
    for (precision, name, prompt), row in by_place.items():
        own = pixels(folder / row["image"])
        assert own.shape == (128, 128, 3)
        assert row["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in row["stages"].values())
        assert row["seconds"] == pytest.approx(sum(row["stages"][s]["seconds"] for s in ("denoise", "decode")))
        assert row["seconds_per_step"] == pytest.approx(row["stages"]["denoise"]["seconds"] / 3)
        for score, other in (
            ("psnr_bf16", ("bf16", name, prompt) if precision != "bf16" else None),
            ("psnr_base", (precision, None, prompt) if name else None),
        ):
            expected = psnr(own, pixels(folder / by_place[other]["image"])) if other else None
            assert row["scores"][score] == (expected and pytest.approx(expected, rel=1e-4))
    assert set(result["versions"]) >= {"torch", "diffusers", "transformers", "bitsandbytes", "peft"}

    # an adapter that is still to come changes no base picture, and without one none is compared with a base
    alone = compare(replace(options, only=["nf4"], run="alone"))
    for row in json.loads((alone / "results.json").read_text())["rows"]:
        assert np.array_equal(pixels(alone / row["image"]), pixels(folder / row["image"]))
        assert "psnr_base" not in row["scores"]


def plain_pipeline(model: Model, stored: torch.dtype) -> FluxPipeline:
    """diffusers' own pipeline with weights rounded to a dtype, in the dtype that this CPU computes in."""
    return FluxPipeline.from_pretrained(model.path, torch_dtype=stored).to(compute_dtype(stored, CPU))


def test_pictures_are_the_plain_pipelines_without_and_with_the_adapter(options: Compare, tmp_path: Path) -> None:
    transformer = load_transformer(options.model, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=4, alpha=9), seed=0):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(transformer, tmp_path / "lora", {})
    del transformer
    options = replace(options, only=["bf16"], prompts=[PROMPT], adapter=Trained(str(tmp_path / "lora"), "mine"))
    folder = compare(options)
    rows = json.loads((folder / "results.json").read_text())["rows"]

    # diffusers alone: its pipeline, its reader of LoRA files, its way from latents to a picture
    pipeline = plain_pipeline(options.model, torch.bfloat16)
    start = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(3)).to(pipeline.dtype)
    theirs = []
    for adapter in (None, "lora"):
        if adapter is not None:
            pipeline.load_lora_weights(tmp_path / adapter)
        (picture,) = pipeline(
            PROMPT, height=128, width=128, num_inference_steps=3, guidance_scale=3.5, max_sequence_length=40,
            latents=FluxPipeline._pack_latents(start, *start.shape),
        ).images  # fmt: skip
        theirs.append(np.asarray(picture, dtype=np.float64))
    ours = [pixels(folder / row["image"]) for row in rows]
    assert [row["adapter"] for row in rows] == [None, "mine"]
    assert psnr(ours[0], theirs[0]) > 45 and psnr(ours[1], theirs[1]) > 45
    assert psnr(ours[0], theirs[1]) < 38 and psnr(ours[1], theirs[0]) < 38


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_a_picture_is_the_plain_pipelines(kind: str, tiny: Model) -> None:
    precision = Precision(kind, compute_dtype=kind)
    sampling = Sampling(steps=4, guidance=2.5)
    with text_encoder(tiny, precision, CPU, None) as encoder:
        (text,) = encoder([PROMPT])
    latents = draw(load_transformer(tiny, precision, CPU), load_scheduler(tiny), text, 7, sampling, (96, 128), CPU)
    ours = decode(load_vae(tiny, CPU), latents, 96, 128)

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    pipeline = plain_pipeline(tiny, dtype)
    # texts are stored in bf16 by a CPU that computes in fp32 too
    with torch.no_grad():
        t5, pooled, _ = pipeline.encode_prompt(PROMPT, max_sequence_length=40)
    t5, pooled = (text.to(dtype).to(pipeline.transformer.dtype) for text in (t5, pooled))
    start = torch.randn((1, 16, 12, 16), generator=torch.Generator().manual_seed(7)).to(t5.dtype)
    start = FluxPipeline._pack_latents(start, *start.shape)
    theirs = pipeline(
        prompt_embeds=t5, pooled_prompt_embeds=pooled, height=96, width=128, num_inference_steps=4,
        guidance_scale=2.5, latents=start, output_type="latent",
    ).images  # fmt: skip
    # our CLIP is always bf16
    near = 2e-2 if kind == "fp32" else 1e-6 if compute_dtype(dtype, CPU) == dtype else 4e-3  # T5 rounds once to bf16
    assert (latents.float() - theirs.float()).norm() < near * theirs.float().norm()
    assert ours.size == (128, 96)


def test_noise_is_the_same_for_every_dtype_and_other_for_every_seed() -> None:
    a, b, c = noise(1, 128, 128, 16), noise(1, 128, 128, 16), noise(2, 128, 128, 16)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.float32


def test_latents_round_trip_through_the_autoencoder(tiny: Model) -> None:
    import random

    picture = world.paint(world.canvas([world.sample_scene(random.Random(3))]), 128)
    vae = load_vae(tiny, CPU, torch.float32)
    mapped = latent_map(tiny)
    posterior = to_posterior(vae, picture * 2 - 1)
    mean, deviation = mapped.normalise(posterior[0]), mapped.deviation(posterior[1])
    assert mean.shape == deviation.shape == (1, 16, 16, 16)
    assert torch.equal(unpack(pack(mean), 128, 128), mean)
    again = decode(vae, pack(mean), 128, 128)
    target = (picture[0].permute(1, 2, 0) * 255).numpy()
    assert psnr(np.asarray(again, dtype=np.float64), target) > 30


def test_texts_are_encoded_one_by_one_and_truncation_is_named(tiny: Model) -> None:
    long = "a red star " * 30
    with text_encoder(tiny, Precision("nf4"), CPU, None) as encoder:
        alone = encoder([PROMPT])[0]
        among = encoder([long, PROMPT])[1]
        assert encoder.truncated([PROMPT, long]) == [long]
        assert encoder.length == 40
    assert torch.equal(alone.embeds, among.embeds) and torch.equal(alone.pooled, among.pooled)


def test_measure_sees_memory_come_and_go() -> None:
    with measure(CPU) as small:
        pass
    with measure(CPU) as large:
        block = torch.ones(100 * 2**20 // 4)
    with measure(CPU) as after:
        del block
        torch.ones(1)
    assert large.peak_memory_bytes - small.peak_memory_bytes > 90 * 2**20
    with measure(CPU) as after:
        pass
    assert after.peak_memory_bytes < large.peak_memory_bytes - 50 * 2**20
    assert small.peak_reserved_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Model("/no/such/folder")}, "no folder here and no Hub id"),
        ({"adapter": Trained("/no/such/lora")}, "there is no adapter at /no/such/lora"),
        ({"scores": {"mine": "nowhere.to.be.found"}}, "scores.mine is 'nowhere.to.be.found'"),
        ({"device": "cuda"}, "sees no CUDA device"),
        ({"run": "../out"}, "run is '../out'"),
    ],
)
def test_bad_input_leaves_nothing(options: Compare, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match=message):
        compare(replace(options, **changes))
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_rounded_again_is_not_streamed(options: Compare, tiny: Model, tmp_path: Path) -> None:
    transformer = load_transformer(tiny, Precision("bf16"), torch.device("cpu"))
    for parameter in attach(transformer, Adapter(rank=4), 0):
        parameter.data += 0.01
    notes = {"adapter": {"init": "loftq"}, "precision": asdict(Precision("nf4"))}
    save_adapter(transformer, tmp_path / "loftq", notes)
    save_start(read_pairs(str(tmp_path / "loftq")), tmp_path / "loftq")
    adapter, memory = Trained(str(tmp_path / "loftq")), Memory(budget_gib=4.0)
    streamed = replace(options, only=["nf4"], adapter=adapter, memory=memory)
    with pytest.raises(ValueError, match=r"adapter\.init=loftq.*set memory\.budget_gib=null"):
        compare(streamed)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"only names \['nf5'\]; choose from nf4"):
        Compare(precisions={"nf4": Precision()}, prompts=["a"], only=["nf5"])
    with pytest.raises(ValueError, match="at least one of prompts"):
        Compare(precisions={"nf4": Precision()})
    with pytest.raises(ValueError, match=r"sampling.width is 100; FLUX draws multiples of 16, such as 96"):
        Sampling(width=100)


def test_an_interrupted_comparison_leaves_the_old_one(options: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(options, only=["bf16"])
    folder = compare(options)
    before = (folder / "results.json").read_bytes()
    monkeypatch.setattr("infer.comparison.draw.decode", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        compare(options)
    assert (folder / "results.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["compare"]
