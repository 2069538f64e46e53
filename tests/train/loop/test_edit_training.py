"""Edit training: what is trained beside what, against pictures that are encoded by themselves, and runs of it."""

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.checkpoint.family import latent_map
from infer.checkpoint.load import load_vae
from infer.checkpoint.model import Model
from infer.comparison.settings import Compare
from infer.program.literal import literal_arguments
from infer.program.paths import CONFIGS
from infer.quantize.precision import Precision
from infer.sample.edit import Edit
from infer.sample.encode import to_posterior
from infer.sample.generate import Sampling
from train.cache import Fill, fill
from train.data.batches import epoch_batches
from train.data.caption import all_texts
from train.data.dataset import Data
from train.data.samples import read_samples
from train.data.source import Source
from train.latents.build import build
from train.latents.settings import Encode
from train.latents.store import Cache
from train.loop.batch import (
    Samples,
    batch_sampler,
    largest_batch,
    split_samples,
    training_batch,
    validation_batch,
    validation_items,
)
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train

CPU = torch.device("cpu")
COLOURS = ["red", "green", "blue", "black"]
Made = tuple[Train, Cache, Samples]


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def make(folder: Path) -> None:
    """after/: four pictures with captions, one of them larger; before/: as large each, but for the last; style/: the
    same picture four times; plain/: two pictures by themselves."""
    for i, colour in enumerate(COLOURS):
        size = (96, 64) if i == 1 else (64, 64)
        for name, seed in (("after", i), ("before", 10 + i), ("style", 99)):
            (folder / name).mkdir(exist_ok=True)
            other = (48, 80) if name == "before" and i == 3 else (32, 32) if name == "style" else size
            smooth(seed, other).save(folder / name / f"{colour}.png")
        (folder / f"after/{colour}.txt").write_text(f"make it {colour}")
    (folder / "plain").mkdir()
    for i in range(2):
        smooth(20 + i, (64, 64)).save(folder / f"plain/{i}.png")
        (folder / f"plain/{i}.txt").write_text(f"number {i}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("edits")
    make(found)
    return found


def sources(folder: Path) -> list[Source]:
    given = [str(folder / "before"), str(folder / "style")]
    return [Source(str(folder / "after"), references=given), Source(str(folder / "plain"))]


@pytest.fixture(scope="module")
def made(folder: Path, tiny: Model) -> Made:
    data = Data(
        resolution=[64, 32], batch_size=2, validation=0, sources=sources(folder), flip=True, reference_dropout=0.3,
        teach_references=True, cache=str(folder / "cache"),
    )  # fmt: skip
    job = Train(model=tiny, precision=Precision("bf16"), data=data)
    samples, _ = read_samples(data)
    texts = all_texts(samples, data)
    cache = build(data, samples, texts, tiny, job.precision, Encode(), CPU)
    return job, cache, split_samples(samples, cache, data, 0)


def encoded(tiny: Model, picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    mean, _ = to_posterior(load_vae(tiny, CPU), pixels.contiguous(memory_format=torch.channels_last))
    return latent_map(tiny).normalise(mean)[0]


def test_each_reference_is_that_of_its_picture_cut_and_mirrored_with_it(made: Made, tiny: Model) -> None:
    """Every sample at every resolution, as it is and mirrored: the pictures' names say what belongs together."""
    job, cache, samples = made
    for i, sample in enumerate(samples.all):
        names = [(Path(one.name).parent.name, Path(one.name).stem) for one in sample.references]
        stem = Path(sample.name).stem
        assert names == ([] if "plain" in sample.name else [("before", stem), ("style", stem)])
        for k, side in enumerate(job.data.resolutions):
            for view in cache.views(i)[k]:
                latents = cache.references(i, view, k)
                for one, found in zip(sample.references, latents, strict=True):
                    with Image.open(one.name) as opened:
                        picture = opened.convert("RGB")
                    if picture.size == Image.open(sample.name).size:
                        scaled = picture.resize((view.width, view.height), Image.Resampling.LANCZOS, box=view.box)
                    else:  # 48x80 is a bucket itself at 64, and at 32 a square is the only one; so is 32x32
                        size = {(48, 80): {64: (48, 80), 32: (32, 32)}, (32, 32): {64: (32, 32), 32: (32, 32)}}
                        w, h = size[picture.size][side]
                        across = min(picture.width, picture.height * w / h)
                        down = min(picture.height, picture.width * h / w)
                        left, top = (picture.width - across) / 2, (picture.height - down) / 2
                        box = left, top, left + across, top + down
                        scaled = picture.resize((w, h), Image.Resampling.LANCZOS, box=box)
                    if view.flip:
                        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                    wanted = encoded(tiny, scaled)
                    assert found.shape == wanted.shape
                    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_reference_of_many_is_encoded_once(made: Made) -> None:
    """8 views of after/ (4 pictures mirrored and not, at two resolutions: 16), as many of before/, 8 of plain/, and one
    of the style that all share, mirrored and not; it is as large at both resolutions."""
    _, cache, _ = made
    assert cache.counts["pictures_misses"] == 16 + 16 + 8 + 2 and cache.counts["pictures_hits"] == 0


def test_batches_are_of_one_form_and_dropout_leaves_all_of_a_sample_out(made: Made) -> None:
    job, cache, samples = made
    stream = batch_sampler(samples, cache, job.data, 0, 1)
    shown = Counter[bool]()
    for epoch in range(40):
        batches = epoch_batches(stream, epoch)
        assert Counter(place.sample for batch in batches for place in batch) == Counter(range(6))
        for places in batches:
            batch = training_batch(job, cache, samples, places, 1.0, CPU) if epoch < 4 else None
            forms = {cache.forms(p.sample)[p.resolution][: None if p.references else 1] for p in places}
            assert len(forms) == 1
            shown.update(place.references for place in places if place.sample < 4)
            if batch is None:
                continue
            (form,) = forms
            tensors = [batch.x0, *batch.references]
            assert [tuple(8 * side for side in each.shape[2:]) for each in tensors] == [*form]
            for row, place in enumerate(places):
                first = cache.views(place.sample)[place.resolution]
                wanted = [cache.references(place.sample, view, place.resolution) for view in first]
                given = [each[row] for each in batch.references]
                assert any(all(map(torch.equal, given, one)) for one in wanted)
    assert shown[False] / shown.total() == pytest.approx(0.3, abs=0.08)


def test_validation_has_all_references_and_the_largest_batch_counts_them(made: Made) -> None:
    job, cache, samples = made
    held = replace(samples, validation=list(range(6)))
    for items in validation_items(job, cache, held, 0, 1):
        batch = validation_batch(job, cache, held, items, CPU)
        assert {len(cache.forms(i)[0]) - 1 for i, _, _ in items} == {len(batch.references)}
    largest = largest_batch(job, cache, samples, CPU)
    assert largest.x0.shape[2:] == (5, 10) or largest.x0.shape[2:] == (6, 10) or len(largest.references) == 2
    tokens = sum(each[0, 0].numel() for each in (largest.x0, *largest.references))
    assert tokens == max(
        sum(height * width for height, width in form) // 64 for i in samples.train for form in cache.forms(i)
    )


def job_of(folder: Path, model: Model, **changes: object) -> Train:
    data = Data(
        resolution=32, batch_size=2, validation=0.3, sources=sources(folder), reference_dropout=0.25, flip=True,
        teach_references=model.path.endswith("model"), cache=str(folder / "cache"), text_length=32,
    )  # fmt: skip
    job = Train(
        model=model, precision=Precision("nf4"), adapter=Adapter(rank=2), data=data, steps=4, save_every=2,
        validate_every=0, validation_levels=1, sampling=Sampling(1, height=32, width=32), device="cpu", run="straight",
    )  # fmt: skip
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["tiny", "klein"])
def test_a_run_is_drawn_and_resumed_bit_for_bit(
    family: str,
    folder: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Model = request.getfixturevalue(family)
    monkeypatch.chdir(tmp_path)
    edit = Edit("make it 'pink', now", [str(folder / "before/red.png")])
    job = job_of(folder, model, previews=["a fox"] if family == "klein" else [], edits=[edit])
    if family == "klein":
        job = replace(job, steps=2)
    whole = load_file(train(job) / FILE)
    assert any(value.any() for key, value in whole.items() if "lora_B" in key)
    with Image.open(f"runs/straight/previews/step-{job.steps:06d}.png") as sheet:
        said = json.loads(sheet.text["flux_lora_sheet"])  # type: ignore[attr-defined]
    assert said["columns"] == ["reference", "base", "adapter"]
    assert said["prompts"][-1] == f"make it 'pink', now [{folder / 'before/red.png'}]"
    if family == "klein":
        return
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  draw:"))
    ConfigStore.instance().store(name="compare_schema", node=Compare)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        words = literal_arguments(shlex.split(line)[3:], Compare)
        options = OmegaConf.to_object(compose("compare", words))
    assert isinstance(options, Compare)
    assert options.edits == [edit] and options.reference_resolution == 32 and options.prompts == []
    train(replace(job, run="again", steps=2, previews=[], edits=[]))
    again = load_file(train(replace(job, run="again", previews=[], edits=[])) / FILE)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_an_update_that_is_left_out_is_dumped_with_its_references(
    folder: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = replace(job_of(folder, tiny).data, sources=sources(folder)[:1], reference_dropout=0)
    job = job_of(folder, tiny, data=data, run="wild", optim=Optim(lr=1e9), stop_after_bad=1, previews=[])
    with pytest.raises(ValueError, match="was not finite 1 times in a row"):
        train(job)
    (file,) = Path("runs/wild/skipped").glob("*/batch-0-0.safetensors")
    dumped = load_file(file)
    assert dumped["references.0"].shape[0] == dumped["references.1"].shape[0] == dumped["x0"].shape[0]


def test_what_cannot_be_is_refused(folder: Path, tiny: Model, klein: Model, tmp_path: Path) -> None:
    job = job_of(folder, tiny)
    with pytest.raises(ValueError, match=r"red\.png|black\.png.* was not trained with reference pictures"):
        train(replace(job, data=replace(job.data, teach_references=False)))
    with pytest.raises(ValueError, match=r"teach_references is true, which has no effect: .* was trained with ref"):
        train(replace(job, model=klein))
    plain = replace(job.data, sources=[Source(str(folder / "plain"))])
    with pytest.raises(ValueError, match=r"reference_dropout is 0\.25, which has no effect: no sample has references"):
        train(replace(job, data=plain))
    with pytest.raises(ValueError, match=r"edits names 'gone\.png', which is no file here"):
        train(replace(job, edits=[Edit("x", ["gone.png"])]))


def test_a_broken_or_too_small_reference_is_said_by_the_policy(folder: Path, tiny: Model, tmp_path: Path) -> None:
    for name in ("after", "before"):
        (tmp_path / name).mkdir()
        for i in range(4):
            smooth(i, (32, 32)).save(tmp_path / name / f"{i}.png")
            (tmp_path / f"after/{i}.txt").write_text("a thing")
    (tmp_path / "before/1.png").write_bytes(b"no picture")
    smooth(0, (32, 8)).save(tmp_path / "before/2.png")
    data = Data(
        str(tmp_path / "after"), 32, references=[str(tmp_path / "before")], on_error="skip", cache=str(tmp_path / "c")
    )
    samples, skipped = read_samples(data)
    assert len(samples) == 4 and not skipped
    cache = build(data, samples, ["a thing"], tiny, Precision("bf16"), Encode(), CPU)
    assert cache.kept == [0, 3]
    reasons = [one.reason for one in cache.skipped]
    assert "has the reference" in reasons[0] and "1.png, which cannot be read as a picture" in reasons[0]
    assert "2.png, which is 32x8, less than 16 pixels a side" in reasons[1]
    with pytest.raises(ValueError, match=r"1\.png has the reference .*before/1\.png, which cannot be read"):
        fill(Fill(tiny, Precision("bf16"), replace(data, on_error="raise"), device="cpu"))
