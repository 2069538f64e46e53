"""The gap and the transfer on a few pictures, against plain calls of the transformer and figures worked out by hand."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.fast.install import Memory
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from infer.report.results import Estimate
from infer.sample.generate import Sampling
from infer.sample.picture import pixel_hash
from train.data.dataset import Data
from train.data.seeds import generator
from train.gap import Gap, gap
from train.objective.optim import Optim
from train.probe.gap_summary import GapRow, summarise
from train.probe.transfer_summary import over_seeds
from train.transfer import Transfer, transfer

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(4):
        small = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(f"a red star {i}")
    return Data("pictures", resolution=64, batch_size=3, validation=0.5)


def plain_latents(model: Model, picture: Image.Image) -> torch.Tensor:
    """A picture's normalised latents [1, 16, height / 8, width / 8], as diffusers' recipes encode them."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(model.path, subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    latents: torch.Tensor = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def plain_velocity(model: Model, kind: str, x: torch.Tensor, sigma: float, number: str) -> torch.Tensor:
    """Packed velocity [1, tokens, 64] at latents x, guidance 1, with the adapter in lora/."""
    dtype = compute_dtype(torch.bfloat16, CPU)
    transformer = FluxTransformer2DModel.from_pretrained(
        model.path, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    if kind == "nf4":  # diffusers refuses it without a GPU: the values that NF4 stores, by bitsandbytes' own functions
        for layer in transformer.modules():
            if isinstance(layer, torch.nn.Linear):
                codes, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=False)
                layer.weight.data = dequantize_4bit(codes, state)
    pipeline = FluxPipeline.from_pretrained(model.path, torch_dtype=torch.bfloat16, transformer=transformer).to(dtype)
    pipeline.load_lora_weights("lora")
    height, width = x.shape[-2:]
    with torch.no_grad():
        t5, pooled, text_ids = pipeline.encode_prompt(f"a red star {number}", None, max_sequence_length=40)
        velocity: torch.Tensor = transformer(
            hidden_states=FluxPipeline._pack_latents(x, *x.shape).to(dtype),
            encoder_hidden_states=t5.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=torch.tensor([sigma]),
            guidance=torch.ones(1),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, dtype),
            txt_ids=text_ids.to(dtype),
            return_dict=False,
        )[0]
    return velocity.float()


def test_the_gap_is_that_of_plain_calls(data: Data, tiny: Model, tmp_path: Path) -> None:
    transformer = load_transformer(tiny, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=2), seed=0):
        parameter.data += 0.05
    save_adapter(transformer, tmp_path / "lora", {})
    precisions = {"nf4": Precision("nf4", t5="bf16"), "bf16": Precision("bf16")}
    options = Gap(tiny, precisions, None, Trained("lora", "mine"), data, levels=2, device="cpu", run="test")
    folder = gap(options)
    result = json.loads((folder / "gap.json").read_text())
    rows = result["rows"]
    assert [(r["precision"], r["adapter"]) for r in rows[::4]] == [
        (precision, adapter) for precision in ("bf16", "nf4") for adapter in (None, "mine")
    ]
    assert {r["sigma"] for r in rows} == {0.25, 0.75} and len({r["picture"] for r in rows}) == 2
    assert all((row["error"] == 0) == (row["precision"] == "bf16") for row in rows)

    # one of them with diffusers alone: its quantization, encoders, LoRA reader and call of the transformer
    chosen = next(r for r in rows if r["precision"] == "nf4" and r["adapter"] == "mine" and r["sigma"] == 0.75)
    number = Path(chosen["picture"]).stem
    with Image.open(f"pictures/{number}.png") as picture:
        x0 = plain_latents(tiny, picture)
        identity = pixel_hash(picture.convert("RGB"))
    noise = torch.randn(x0.shape[1:], generator=generator(0, "validation", identity, 1))[None]
    velocities = {name: plain_velocity(tiny, name, 0.25 * x0 + 0.75 * noise, 0.75, number) for name in precisions}
    target = FluxPipeline._pack_latents(noise - x0, *x0.shape)
    loss = float((velocities["nf4"] - target).square().mean())
    assert chosen["loss"] == pytest.approx(loss, rel=0.01)
    error = float((velocities["nf4"] - velocities["bf16"]).norm() / velocities["bf16"].norm())
    assert chosen["error"] == pytest.approx(error, rel=0.05)

    whole = {(e["precision"], e["adapter"]): e for e in result["summary"] if e["level"] is None}
    own = [r["loss"] for r in rows if (r["precision"], r["adapter"]) == ("nf4", None)]
    theirs = [r["loss"] for r in rows if (r["precision"], r["adapter"]) == ("bf16", None)]
    entry = whole["nf4", None]
    assert entry["loss"]["mean"] == pytest.approx(statistics.fmean(own))
    assert entry["cost"]["mean"] == pytest.approx(statistics.fmean(own) - statistics.fmean(theirs))
    assert entry["transformer_bytes"] < whole["bf16", None]["transformer_bytes"]
    assert (folder / "gap.png").stat().st_size > 10_000 and (folder / "gap.md").read_text().count("\n") == 6

    # an adapter of another model is refused
    other = load_transformer(tiny, Precision("bf16"), CPU)
    parameters = attach(other, Adapter(rank=2, targets="single"), seed=0)
    save_adapter(other, tmp_path / "zero", {})
    assert parameters
    with pytest.raises(ValueError, match="zero in every layer"):
        gap(replace(options, adapter=Trained("zero"), only=["bf16"]))


def test_limits_are_over_pictures_and_differences_are_paired() -> None:
    rows = []
    for name, more in (("bf16", 0.0), ("nf4", 0.25)):
        for i in range(20):
            for level in range(2):
                rows.append(GapRow(name, None, str(i), level, level / 2, float(i) + more, more, 1))
    summary = summarise(rows)
    assert [entry.level for entry in summary] == [None, 0, 1] * 2
    entry = summary[3]
    assert entry.cost == Estimate(0.25, 0.25, 0.25, 40)
    # twenty pictures, not forty: both levels of a picture come together
    assert entry.loss.low is not None and entry.loss.high is not None
    assert entry.loss.high - entry.loss.low == pytest.approx(2 * 1.96 * 5.77 / 20**0.5, rel=0.1)


def test_students_limits() -> None:
    from scipy.stats import ttest_1samp

    values = [0.3, 0.5, 0.45, 0.1, 0.35]
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    found = over_seeds(values)
    assert found[1:3] == pytest.approx([theirs.low, theirs.high]) and found.mean == pytest.approx(0.34)


def test_transfer_trains_and_runs_every_pair(data: Data, tiny: Model) -> None:
    options = Transfer(
        tiny, {"bf16": Precision("bf16"), "fp4": Precision("fp4")}, Adapter(rank=2), replace(data, batch_size=1),
        optim=Optim(lr=0.05), memory=Memory(keep="everything"), sampling=Sampling(1, height=64, width=64),
        seeds=[0, 1], steps=2, levels=2, run="test", device="cpu",
    )  # fmt: skip
    folder = transfer(options)
    result = json.loads((folder / "transfer.json").read_text())
    rows = {(row["trained"], row["run"], row["seed"]): row["loss"] for row in result["rows"]}
    assert len(rows) == 2 * 2 * 2 and len(set(rows.values())) == 8
    for name in ("bf16", "fp4"):  # as the training run itself measured it at its end
        for seed in (0, 1):
            lines = (Path("runs/test") / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines()
            last = [json.loads(line) for line in lines if "validation_loss" in line][-1]
            assert rows[name, name, seed] == pytest.approx(last["validation_loss"], rel=1e-4)
    entry = next(e for e in result["summary"] if (e["trained"], e["run"]) == ("fp4", "bf16"))
    costs = [rows["fp4", "bf16", seed] - rows["bf16", "bf16", seed] for seed in (0, 1)]
    assert entry["cost"]["mean"] == pytest.approx(statistics.fmean(costs))
    assert entry["cost"]["low"] < min(costs) and entry["cost"]["high"] > max(costs)
    assert (folder / "transfer.png").stat().st_size > 10_000
    assert (folder / "transfer.md").read_text().count("| fp4 |") == 2
    assert [e["cost"]["mean"] for e in result["summary"] if e["trained"] == e["run"]] == [0, 0]
