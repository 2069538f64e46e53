"""sampling.model: an adapter of one checkpoint drawn on another too, in previews and comparisons."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.adapter.second import second_model
from infer.adapter.selection import Trained
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare, check_compare, on_second
from infer.merging.settings import Merge
from infer.quantize.precision import Precision
from infer.sample.edit import Edit
from infer.sample.generate import Sampling, noise
from infer.sample.sheet import Layout
from scripts.tiny.make_style import make_style
from tests.tiny_klein import make_klein
from train.data.dataset import Data
from train.loop import second
from train.loop.preview import SHEET
from train.objective.optim import Optim
from train.run.config import Train
from train.run.names import check_names
from train.train import train

SIDE = 32


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A distilled klein whose weights are not the base's."""
    folder = make_klein(tmp_path_factory.mktemp("few") / "few-steps", distilled=True)
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    for name in weights:
        if "to_v.weight" in name or "to_out" in name:
            weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, file, {"format": "pt"})
    return str(folder)


@pytest.fixture
def job(klein: Model, distilled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.chdir(tmp_path)
    make_style(Path("pictures"), 4, 0)
    return Train(
        model=klein, data=Data(path="pictures", resolution=SIDE, text_length=32, validation=0.25), steps=2,
        validate_every=0, validation_levels=1, previews=["a fox"], device="cpu", run="both",
        sampling=Sampling(steps=1, height=SIDE, width=SIDE, model=distilled), precision=Precision("fp32"),
        adapter=Adapter(rank=4), optim=Optim(lr=0.1, warmup=0),
    )  # fmt: skip


def columns(file: Path) -> dict[str, Image.Image]:
    """A sheet of one prompt, cut into its pictures."""
    with Image.open(file) as board:
        drawn = json.loads(board.text[SHEET])  # type: ignore[attr-defined]
        layout = Layout(drawn["prompts"], drawn["columns"], tuple(drawn["size"]))
        cells = {name: board.crop(layout.cell(0, i)) for i, name in enumerate(layout.columns)}
        return {name: cell.resize((SIDE, SIDE), Image.Resampling.NEAREST) for name, cell in cells.items()}


def far(a: Image.Image, b: Image.Image) -> float:
    """Mean difference of two pictures' values, of 255."""
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())


def test_previews_and_a_comparison_are_those_of_the_distilled_pipeline(job: Train, distilled: str) -> None:
    adapter = train(job)
    found = columns(Path("runs/both/previews/step-000002.png"))
    assert list(found) == ["base", "adapter", "base on few-steps", "adapter on few-steps"]
    pipeline = Flux2KleinPipeline.from_pretrained(distilled, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> Image.Image:
        start = noise(0, SIDE, SIDE, 16).transpose(1, 2).unflatten(2, (2, 2))
        how = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 32, "latents": start}
        picture: Image.Image = pipeline(prompt="a fox", height=SIDE, width=SIDE, **how).images[0]
        return picture

    base = theirs()
    pipeline.load_lora_weights(adapter, weight_name=FILE)
    drawn = theirs()
    assert far(drawn, base) > 3, "the adapter does nothing, and the rest would hold in any case"
    assert far(found["base on few-steps"], base) < 1.5 and far(found["adapter on few-steps"], drawn) < 1.5
    assert far(found["adapter"], drawn) > 3

    options = Compare(
        model=job.model, precisions={"fp32": Precision("fp32")}, prompts=["a fox"], sampling=job.sampling,
        text_length=32, device="cpu", run="both", adapter=Trained(str(adapter)),
    )  # fmt: skip
    assert compare(options) == Path("runs/both/compare")
    first, then = (json.loads(Path(f"runs/both/{name}/results.json").read_text()) for name in
                   ("compare", "compare-few-steps"))  # fmt: skip
    assert (first["sampling"]["steps"], first["sampling"]["guidance"]) == (1, 4.0)
    assert (then["sampling"]["steps"], then["sampling"]["guidance"]) == (4, 1.0)
    assert then["model"] == distilled and first["model"] == job.model.path
    shown = Image.open(Path("runs/both/compare-few-steps") / then["rows"][1]["image"])
    assert far(shown, drawn) < 1.5


def test_what_does_not_fit_is_said_and_the_run_goes_on(
    job: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(second.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    train(replace(job, run="tight"))
    assert list(columns(Path("runs/tight/previews/step-000002.png"))) == ["base", "adapter"]
    said = capsys.readouterr()
    assert "no previews on the second checkpoint" in said.out + said.err


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("SELF", {}, "which is the model itself"),
        ("nowhere", {}, "sampling.model is 'nowhere': .*give distilled, a name that model=... takes"),
        ("distilled", {}, "no checkpoint is known that is distilled from"),
        ("tiny", {}, "is of FLUX.1, and .* of FLUX.2; choose one of the same family and size"),
        ("SECOND", {"previews": []}, r"sampling\.model is .* has no effect: previews=\[\]"),
        ("SECOND", {"adapter": Adapter(init="residual")}, "rounding error of .*; set sampling.model=null"),
        ("SECOND", {"adapter": Adapter(recovery="RECOVERY")}, "recovery adapter makes up for the rounding of one"),
    ],
)
def test_pairs_that_cannot_be_are_refused(name: str, changes: dict, said: str, job: Train, distilled: str) -> None:  # type: ignore[type-arg]
    path = {"SELF": job.model.path, "SECOND": distilled}.get(name, name)
    with pytest.raises(ValueError, match=said):
        check_names(replace(job, sampling=Sampling(model=path), **changes))


def test_a_file_in_the_working_folder_is_a_second_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name without a slash, as no Hub id has; what is in it is checked elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("few.safetensors").write_bytes(b"")
    for check in ("check_model", "_check_alike"):
        monkeypatch.setattr(f"infer.adapter.second.{check}", lambda *models: None)
    assert second_model(Model("owner/base"), "few.safetensors").file == Path("few.safetensors")
    with pytest.raises(ValueError, match=r"'none\.safetensors' is no folder"):
        second_model(Model("owner/base"), "none.safetensors")


def test_each_checkpoint_settles_its_own_precision_and_takes_the_edits(
    klein: Model, distilled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Compare(
        model=klein, precisions={"auto": Precision("auto", budget_gib=1.0)}, prompts=["a fox"], device="cpu",
        sampling=Sampling(model=distilled),
    )  # fmt: skip
    found = on_second(options)
    assert found is not None
    options.precisions["auto"] = Precision("nf4")  # as draw_all does
    assert found[1].precisions["auto"].kind == "auto"
    monkeypatch.setattr("infer.sample.edit.takes_references", lambda model: model.path == klein.path)
    Image.new("RGB", (32, 32)).save(tmp_path / "before.png")
    with pytest.raises(ValueError, match="few-steps was not trained with reference pictures"):
        check_compare(replace(options, edits=[Edit("make it red", [str(tmp_path / "before.png")])]))


def test_names_and_sizes_are_known_without_a_checkpoint() -> None:
    base = Model("black-forest-labs/FLUX.2-klein-base-4B", weights="random")
    for name in ("distilled", "klein4b_distilled", "black-forest-labs/FLUX.2-klein-4B"):
        assert second_model(base, name) == Model("black-forest-labs/FLUX.2-klein-4B", weights="random")
    with pytest.raises(ValueError, match="blocks of other sizes"):
        second_model(base, "klein9b_distilled")
    dev = Model("black-forest-labs/FLUX.1-dev", weights="random")
    assert second_model(dev, "schnell").path == "black-forest-labs/FLUX.1-schnell"


def test_commands_that_draw_on_one_model_refuse_a_second_one(klein: Model, distilled: str) -> None:
    with pytest.raises(ValueError, match=r"sampling\.model is .*this command draws on one model"):
        Merge(klein, sampling=Sampling(model=distilled))
    recovered = Compare(
        model=klein, precisions={"nf4": Precision("nf4")}, prompts=["a fox"], sampling=Sampling(model=distilled),
        recovery={"nf4": "runs/recover/adapter"}, device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"recovery"):
        check_compare(recovered)
