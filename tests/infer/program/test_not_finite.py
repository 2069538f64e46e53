"""Numbers that are not finite, wherever they come from, end in words and leave nothing behind."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infer.adapter.attach import attach
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.selection import Trained
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family.family import Text
from infer.merge import merge
from infer.merging.settings import Merge
from infer.quantize.precision import Precision
from infer.sample.encode import NotFiniteError, TextEncoder
from infer.sample.references import encode_reference
from train.cache import Fill, fill
from train.data.dataset import Data
from train.run.config import Train
from train.train import train

CPU, BF16 = torch.device("cpu"), Precision("bf16")
VAE, TRANSFORMER = ("vae", "encoder.conv_in.weight"), ("transformer", "proj_out.weight")


def damaged(model: Model, folder: Path, part: str, name: str) -> Model:
    """The bundled model with one weight of a part that is no number."""
    shutil.copytree(model.path, folder, copy_function=os.symlink)
    for file in (folder / part).glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights[name].view(-1)[0] = torch.nan
            file.unlink()
            save_file(weights, file, metadata={"format": "pt"})
            return Model(str(folder))
    raise AssertionError(f"there is no {name}")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.linear_gradient("L").resize((64, 64)).rotate(30 * i).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"a grey step {i}")
    return Data("pictures", 64, 1, validation=0.3, cache="cache")


def test_latents_of_a_damaged_autoencoder_are_neither_stored_nor_drawn_with(
    tiny: Model, data: Data, tmp_path: Path
) -> None:
    model = damaged(tiny, tmp_path / "model", *VAE)
    with pytest.raises(NotFiniteError, match=r"latents of .*\.png are not finite; its checkpoint may be damaged"):
        fill(Fill(model, BF16, data, device="cpu"))
    shards = [load_file(file) for file in Path("cache").rglob("*.safetensors")]
    assert not any("mean" in key for shard in shards for key in shard)
    with pytest.raises(NotFiniteError, match="latents of a reference picture are not finite"):
        encode_reference(load_vae(model, CPU), Image.new("RGB", (64, 64)), 64)


def test_before_anything_is_learned_the_checkpoint_is_at_fault(tiny: Model, data: Data, tmp_path: Path) -> None:
    model = damaged(tiny, tmp_path / "model", *TRANSFORMER)
    job = Train(
        model=model, precision=BF16, adapter=Adapter(rank=2), data=data, steps=1, previews=[], device="cpu", run="mine"
    )
    with pytest.raises(ValueError, match=r"validation loss is nan: nothing is learned yet, so that .*model or what"):
        train(job)
    assert not Path("runs/mine/adapter").exists()


@pytest.mark.parametrize("part", ["embeds", "pooled"])
def test_embeddings_are_checked_whole(part: str) -> None:
    text = Text(torch.ones(4, 8), torch.ones(8))
    ruined = replace(text, **{part: torch.full((8,), torch.inf)})
    with pytest.raises(NotFiniteError, match="embeddings of 'a cat' are not finite"):
        TextEncoder(lambda prompt: ruined, len, 4, 0)(["a cat"])
    assert TextEncoder(lambda prompt: text, len, 4, 0)(["a cat"])


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_no_part_of_an_adapter_is_written_that_is_not_finite(part: str, tiny: Model, tmp_path: Path) -> None:
    transformer = load_transformer(tiny, BF16, CPU)
    attach(transformer, Adapter(rank=2, dora=True), seed=0)
    next(p for name, p in transformer.named_parameters() if part in name).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="the adapter is not finite in 1 layers"):
        save_adapter(transformer, tmp_path / "mine", {})
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("precision", [BF16, Precision("nf4")])
def test_nothing_is_merged_that_is_not_finite(precision: Precision, tiny: Model, tmp_path: Path) -> None:
    transformer = load_transformer(tiny, BF16, CPU)
    for parameter in attach(transformer, Adapter(rank=2, targets=r"single.*proj_out"), seed=0):
        parameter.data.fill_(1e19)  # B A is 2e38
    save_adapter(transformer, tmp_path / "mine", {})
    for model, weight, said in (
        (tiny, 10.0, r"proj_out\.weight with the adapters in it is not finite in bf16; lower adapter\.weight"),
        (damaged(tiny, tmp_path / "model", *TRANSFORMER), 1.0, r"proj_out\.weight of the checkpoint is not finite"),
    ):
        chosen = Trained(str(tmp_path / "mine"), weight=weight)
        with pytest.raises(ValueError, match=said):
            merge(Merge(model, precision, chosen, str(tmp_path / "merged"), device="cpu"))
        assert not (tmp_path / "merged").exists()
