"""Scores against their formulas and against torchmetrics, with tiny random networks in the libraries' own folders."""

import json
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.image.kid import poly_mmd

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.quantize.precision import Precision
from infer.report.cells import difference_cells, plain, summary_cells, text_table
from infer.report.results import Estimate, Row, Stage, to_json
from infer.sample.generate import Sampling
from infer.score.judges import list_pictures
from infer.score.kid_cmmd import gaussian, nearest, polynomial, squared_distance, thumbnail
from infer.score.memorization import score_likeness
from infer.score.networks import Loaded, Networks, _alexnet, check_networks, load_networks
from infer.score.pairs import key_of, to_pixels
from infer.score.score_all import score_all
from infer.score.summary import summarise_scores

CPU = torch.device("cpu")


def table_of(cells: tuple[list[str], list[Any]], names: int = 2) -> str:
    titles, lines = cells
    return text_table([titles, *(list(map(plain, line)) for line in lines)], names)


def noise(seed: int, side: int = 64) -> Image.Image:
    smooth = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC)


def row_of(image: str, precision: str, adapter: str | None, prompt: str, seed: int) -> Row:
    return Row(
        precision=precision,
        adapter=adapter,
        prompt=prompt,
        seed=seed,
        image=image,
        seconds=1.0,
        seconds_per_step=1.0,
        weights_bytes=1,
        peak_memory_bytes=1,
        scores={},
        stages={"load": Stage(1.0, 1)},
    )


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """CLIP, DINOv2 and AlexNet with random weights, as their libraries save them."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = narrow | {"vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 1, "pad_token_id": 0}
    sight = narrow | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=words, vision_config=sight, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    transformers.CLIPImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(folder / "clip")
    transformers.ByT5Tokenizer().save_pretrained(folder / "clip")
    dino = transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **narrow)
    transformers.Dinov2Model(dino).save_pretrained(folder / "dino")
    size = {"shortest_edge": 28}, {"height": 28, "width": 28}
    transformers.BitImageProcessorPil(size=size[0], crop_size=size[1]).save_pretrained(folder / "dino")
    convolutions = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {"classifier.6.bias": torch.zeros(1000)}
    for layer, (out, width, kernel) in convolutions.items():
        state[f"features.{layer}.weight"] = torch.randn(out, width, kernel, kernel) / (width * kernel**2) ** 0.5
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(out)
    torch.save(state, folder / "alexnet.pth")
    return Networks(*(str(folder / name) for name in ("clip", "dino", "alexnet.pth")))


def test_lpips_is_torchmetrics(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert networks.lpips is not None
    features = _alexnet(networks.lpips)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda name, pretrained: features)
    monkeypatch.setattr(torchmetrics_lpips, "_TORCHVISION_AVAILABLE", True)
    theirs = torchmetrics_lpips._LPIPS(pretrained=True, net="alex", use_dropout=True, eval_mode=True)
    ours = load_networks(Networks(lpips=networks.lpips), CPU).lpips
    assert ours is not None
    for a, b in ((0, 1), (2, 3)):
        with torch.no_grad():
            expected = float(theirs(to_pixels(noise(a)), to_pixels(noise(b)), normalize=True))
        assert ours(noise(a), noise(b)) == pytest.approx(expected, rel=1e-5)
    assert ours(noise(1), noise(1)) == 0


def test_clip_and_dino_are_the_libraries_own(networks: Networks) -> None:
    loaded = load_networks(replace(networks, lpips=None), CPU)
    assert loaded.clip is not None and loaded.text is not None and loaded.dino is not None
    pictures, prompts = [noise(i) for i in range(3)], ["a", "a red star"]
    model = transformers.CLIPModel.from_pretrained(networks.clip).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(networks.clip)
    words = transformers.ByT5Tokenizer.from_pretrained(networks.clip)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model(pixel_values=processor(pictures, return_tensors="pt").pixel_values, **words)
    torch.testing.assert_close(loaded.clip(pictures), own.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.text(prompts), own.text_embeds, rtol=1e-4, atol=1e-5)
    # one by one is as all together, beyond a batch too
    many = [noise(i) for i in range(20)]
    torch.testing.assert_close(loaded.dino(many)[17:18], loaded.dino(many[17:18]), rtol=1e-4, atol=1e-5)


def test_distances_of_sets_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 24, generator=generator) for n in (7, 9))
    kid = squared_distance(a, b, polynomial)
    same = squared_distance(a, b[:7], polynomial)
    assert same.mean == pytest.approx(float(poly_mmd(a.double(), b[:7].double())), rel=1e-6)

    x, y = functional.normalize(a).double(), functional.normalize(b).double()

    def kernel(p: Any, q: Any) -> float:
        return 1000 * float(torch.exp(-(p - q).square().sum() / (2 * 10**2)))

    within_x = np.mean([kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j])
    within_y = np.mean([kernel(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j])
    across = np.mean([kernel(p, q) for p in x for q in y])
    cmmd = squared_distance(x, y, gaussian)
    assert cmmd.mean == pytest.approx(within_x + within_y - 2 * across, abs=1e-9)
    # the jackknife, by leaving out in earnest
    left = [squared_distance(torch.cat([a[:i], a[i + 1 :]]), b, polynomial).mean for i in range(7)]
    right = [squared_distance(a, torch.cat([b[:i], b[i + 1 :]]), polynomial).mean for i in range(9)]
    variance = sum((len(v) - 1) / len(v) * np.square(np.array(v) - np.mean(v)).sum() for v in (left, right))
    assert kid.low is not None and kid.mean - kid.low == pytest.approx(1.96 * variance**0.5, rel=1e-6)
    assert squared_distance(a[:2], b, polynomial).low is None


def test_the_nearest_training_picture_is_found() -> None:
    training = torch.stack([thumbnail(noise(i, 200), 1.0) for i in range(6)])
    distance, index = nearest(torch.stack([thumbnail(noise(4, 128), 1.0), thumbnail(noise(77), 1.0)]), training)
    assert int(index[0]) == 4 and distance[0] < 0.02 < 0.1 < distance[1]
    # a wide picture is cut to the shape before it is compared
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste(noise(2, 100), (100, 0))
    assert nearest(thumbnail(wide, 1.0)[None], training)[0] < 0.03


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 112)])
def test_a_copy_of_a_training_picture_is_found_however_it_was_stored(size: tuple[int, int], tmp_path: Path) -> None:
    """Ours and theirs are cut alike, and theirs are seen as the trainer sees them."""
    folder, references = tmp_path / "run", tmp_path / "pictures"
    folder.mkdir()
    references.mkdir()
    whole = [noise(i, 128).resize(size) for i in range(5)]
    for i, picture in enumerate(whole):
        picture.save(folder / f"{i}.png")
    whole[0].save(references / "0.png")
    turned = whole[1].transpose(Image.Transpose.ROTATE_90)  # 6: to be shown turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(references / "1.png", exif=exif)
    hidden = np.asarray(whole[2]).copy()
    hidden[: size[1] // 2] = 0  # what lies under fully transparent pixels, where white is seen
    alpha = np.full(size[::-1], 255, np.uint8)
    alpha[: size[1] // 2] = 0
    Image.fromarray(np.dstack([hidden, alpha])).save(references / "2.webp", lossless=True)
    seen = np.asarray(whole[2]).copy()
    seen[: size[1] // 2] = 255
    Image.fromarray(seen).save(folder / "2.png")
    whole[3].convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(references / "3.gif")
    wide = Image.new("RGB", (3 * size[0], size[1]), "red")  # the trainer's crop of it is its middle
    wide.paste(whole[4], (size[0], 0))
    wide.save(references / "4.jp2", irreversible=False)
    rows = [row_of(f"{i}.png", "bf16", None, "a red star", i) for i in range(5)]
    known, sets = score_likeness(rows, folder, str(references), Loaded())
    assert [row.nearest for row in rows] == ["0.png", "1.png", "2.webp", "3.gif", "4.jp2"] and known.count == 5
    assert sets == []
    distances = [value for row in rows if (value := row.scores["nearest_rms"]) is not None]
    assert distances[0] == distances[1] == distances[2] == 0 and distances[4] < 0.01 and distances[3] < 0.05, distances
    (references / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"5\.png cannot be read as a picture"):
        score_likeness(rows, folder, str(references), Loaded())


def drawn(folder: Path) -> tuple[list[Row], dict[Any, torch.Tensor]]:
    """Pictures and latents of two precisions without and with an adapter, three prompts, two seeds."""
    rows, latents = [], {}
    (folder / "images").mkdir(parents=True)
    for number, (precision, adapter) in enumerate((p, a) for p in ("bf16", "nf4") for a in (None, "mine")):
        for prompt in range(3):
            for seed in range(2):
                image = f"images/{number}-{prompt}-{seed}.png"
                base = np.asarray(noise(10 * prompt + seed), dtype=float)
                shift = np.random.default_rng(number).normal(0, 4 * number, base.shape)
                Image.fromarray((base + shift).clip(0, 255).astype(np.uint8)).save(folder / image)
                rows.append(row_of(image, precision, adapter, f"p{prompt}", seed))
                latents[key_of(rows[-1])] = torch.full((1, 4, 4), 1.0 + number)
    return rows, latents


def test_every_score_is_there_or_named_as_absent(networks: Networks, tmp_path: Path) -> None:
    references = tmp_path / "pictures"
    (references / "deep").mkdir(parents=True)
    for i in range(5):
        noise(10 * i).save(references / "deep" / f"{i}.png")
    (references / "deep" / "0.txt").write_text("a caption")
    rows, latents = drawn(tmp_path / "run")
    rows, drift = ([row for row in rows if (row.prompt == "p2") is apart] for apart in (False, True))
    bleed = [replace(row, prompt="p1", scores={}) for row in rows if row.prompt == "p1"]

    def brightness(picture: Image.Image, prompt: str) -> float:
        return float(np.asarray(picture).mean())

    own = {"own": lambda picture, prompt: 1.0 + (prompt == "p1"), "light": brightness}
    arguments = drift, bleed, tmp_path / "run", latents, "bf16", own
    result = score_all(rows, *arguments, networks, str(references), {}, CPU)
    assert result.absent == {"image_reward": "networks.image_reward is null"}
    for row in rows:
        assert (row.scores["psnr_bf16"] is None) == (row.precision == "bf16")
        assert (row.scores["lpips_base"] is None) == (row.adapter is None)
        assert {"clip_t", "dino", "clip_i", "nearest_rms", "nearest_dino", "own"} <= row.scores.keys()
    first = rows[0]
    assert first.nearest == "deep/0.png" and first.scores["nearest_rms"] == 0
    assert first.scores["nearest_dino"] == pytest.approx(1, abs=1e-4)
    entries = summarise_scores(rows, {"drift": drift, "bleed": bleed}, result.sets, "bf16", list(own))
    summary = {entry.variant: entry for entry in entries}
    entry = summary["nf4", "mine"]
    assert entry.scores["latents_bf16"] == pytest.approx((4 - 2) / 2)
    assert entry.scores["drift_latents"] == pytest.approx((4 - 3) / 3)
    assert entry.differences is not None and entry.intervals is not None
    assert entry.scores["own"] == 1.5 and entry.differences["bf16"]["own"] == Estimate(0, 0, 0, 4)
    change = entry.differences["base"]["latents_bf16"]
    assert change.mean == pytest.approx(1 - 2) and change.pictures == 4
    low, high = entry.intervals["psnr_bf16"]
    mean = entry.scores["psnr_bf16"]
    assert mean is not None and low < mean < high
    assert {"kid", "cmmd", "drift_lpips", "drift_psnr"} <= entry.scores.keys()
    assert "drift_psnr" not in summary["nf4", None].scores
    light = {row.adapter: [] for row in bleed}
    for row in bleed:
        if row.precision == "nf4":
            light[row.adapter].append(brightness(Image.open(tmp_path / "run" / row.image), ""))
    moved = np.mean(light["mine"]) - np.mean(light[None])
    assert entry.scores["bleed_light"] == pytest.approx(moved) and entry.scores["bleed_own"] == 0
    assert entry.scores["bleed_latents"] == pytest.approx((4 - 3) / 3)
    assert len(entry.intervals["bleed_psnr"]) == 2 and "bleed_light" not in summary["nf4", None].scores
    json.dumps([to_json(entries), to_json(result.references)], allow_nan=False)
    shown = table_of(summary_cells(entries, "peak memory"))
    assert f"({low:.2f} to {high:.2f})" in shown and max(map(len, shown.splitlines())) <= 160
    assert "no adapter" in table_of(difference_cells(entries), 3)

    rows, latents = drawn(tmp_path / "bare")
    absent = score_all(rows, [], [], tmp_path / "bare", latents, "bf16", {}, Networks(), None, {}, CPU).absent
    assert absent["lpips"] == "networks.lpips is null" and absent["nearest_rms"] == "references is null"
    assert absent["drift"] == "unrelated is empty" and absent["bleed"] == "class_prompts is empty"
    assert absent.keys() >= {"clip_t", "clip_i", "cmmd", "dino", "kid", "image_reward"}


def test_image_reward_is_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"networks.image_reward is .*, but its package is not here"):
        check_networks(Networks(image_reward="ImageReward-v1.0"))

    class Judge(nn.Module):
        def score(self, prompt: str, pictures: list[Image.Image]) -> float:
            return len(prompt) + pictures[0].width

    package: Any = ModuleType("ImageReward")
    package.__spec__ = object()
    package.load = lambda name, device: Judge()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    check_networks(Networks(image_reward="ImageReward-v1.0"))
    score = load_networks(Networks(image_reward="ImageReward-v1.0"), CPU).image_reward
    assert score is not None and score(noise(0), "four") == 68


def test_wrong_networks_and_references(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        (Networks(clip="/no/clip"), "networks.clip is '/no/clip', which is no folder here and no Hub id"),
        (Networks(clip=networks.dino), "is of type dinov2, not a CLIP model"),
        (Networks(dino=networks.clip), "is of type clip, not a vision model"),
        (Networks(dino=str(tmp_path)), "cannot load networks.dino from"),
        (Networks(lpips="/no/file"), "networks.lpips is '/no/file', and there is no such file"),
        (Networks(lpips=str(Path(str(networks.clip)) / "model.safetensors")), "does not hold AlexNet's weights"),
    ):
        with pytest.raises(ValueError, match=message):
            check_networks(wrong)
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"torchmetrics has no LPIPS weights at .*set networks.lpips to null"):
        check_networks(Networks(lpips=networks.lpips))
    with pytest.raises(ValueError, match="references is '/no/folder', which is no folder"):
        list_pictures("/no/folder")
    with pytest.raises(ValueError, match="holds no picture"):
        list_pictures(str(tmp_path))


def test_a_comparison_draws_the_unrelated_prompts_apart(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    transformer = load_transformer(tiny, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=2), seed=0):
        parameter.data += 0.05
    save_adapter(transformer, tmp_path / "lora", {})
    noise(0).save(tmp_path / "lora" / "a.png")
    options = Compare(
        model=tiny, precisions={"bf16": Precision("bf16")}, prompts=["a red star"], sampling=Sampling(steps=1),
        references=str(tmp_path / "lora"), run="test", device="cpu",
    )  # fmt: skip
    alone = json.loads((compare(options) / "results.json").read_text())
    assert [row["prompt"] for row in alone["rows"]] == ["a red star"] and alone["drift"] == []
    assert alone["references"]["count"] == 1 and "drift" not in alone["absent"]
    adapted = replace(options, adapter=Trained(str(tmp_path / "lora")))
    folder = compare(replace(adapted, unrelated=["a blue ring"], class_prompts=["a star"]))
    result = json.loads((folder / "results.json").read_text())
    assert [row["prompt"] for row in result["rows"]] == ["a red star"] * 2
    assert [(row["prompt"], row["adapter"]) for row in result["drift"]] == [("a blue ring", a) for a in (None, "test")]
    with_adapter = result["summary"][1]["scores"]
    assert with_adapter["drift_psnr"] == result["drift"][1]["scores"]["psnr_base"] > 0
    assert [(row["prompt"], row["adapter"]) for row in result["bleed"]] == [("a star", a) for a in (None, "test")]
    assert with_adapter["bleed_latents"] == result["bleed"][1]["scores"]["latents_base"] > 0
    assert "one of the prompts of the class" in (folder / "report.html").read_text()
    assert "Not measured" in (folder / "report.md").read_text()
