"""Merging: weights by the formula, rounded once, as loading the merged checkpoint unquantized would round them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.read import read_pairs
from infer.adapter.selection import Trained, Weighted
from infer.adapter.switch import set_adapters
from infer.adapter.targets import base_layers
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.checkpoint.originals import Originals
from infer.fast import install as fast
from infer.merge import merge
from infer.merging.settings import Merge
from infer.quantize.precision import Precision, linear_layers
from infer.quantize.storage import dequantized
from infer.save import Save, save
from tests.infer.adapter.test_adapters import TINY, inputs, randomise

CPU = torch.device("cpu")
FP32 = Precision("fp32", compute_dtype="fp32")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters on different layers that share some, of different rank and strength."""
    paths = []
    for seed, adapter in enumerate((Adapter(rank=4, alpha=6), Adapter(rank=3, alpha=3, targets="single"))):
        transformer = load_transformer(TINY, FP32, CPU)
        attach(transformer, adapter, seed=seed)
        randomise(transformer, seed)
        paths.append(str(save_adapter(transformer, tmp_path_factory.mktemp(f"adapter-{seed}"), {})))
    return paths


def test_several_with_weights_at_run_time_and_merged(adapters: list[str], tmp_path: Path) -> None:
    """Both ways against weights that are put together by hand."""
    weights = [0.5, -1.25]
    by_hand, own = load_transformer(TINY, FP32, CPU), Originals(TINY)
    for path, weight in zip(adapters, weights, strict=True):
        for layer, pair in read_pairs(path).items():
            base_layers(by_hand)[layer].weight.data += weight * pair.strength * pair.up @ pair.down
    both = Trained(adapters[0], weight=weights[0], also=[Weighted(adapters[1], weights[1])])
    out = merge(Merge(TINY, FP32, adapter=both, out=str(tmp_path / "both"), device="cpu"))
    once = load_transformer(Model(str(out)), FP32, CPU)
    running = load_transformer(TINY, FP32, CPU)
    with torch.no_grad():
        base = running(**inputs())[0]
        for name, path in zip("ab", adapters, strict=True):
            load_adapter(running, path, name)
        set_adapters(running, dict(zip("ab", weights, strict=True)))
        expected = by_hand(**inputs())[0]
        for transformer in (once, running):
            assert (transformer(**inputs())[0] - expected).norm() < 1e-4 * (expected - base).norm()
        set_adapters(running, {})
        assert torch.equal(running(**inputs())[0], base)
        set_adapters(running, {"b": 1.0, "a": 0.0})
        alone = load_transformer(TINY, FP32, CPU)
        load_adapter(alone, adapters[1], "b")
        torch.testing.assert_close(running(**inputs())[0], alone(**inputs())[0])
    with pytest.raises(ValueError, match="there is no adapter 'c'; loaded are a, b"):
        set_adapters(running, {"c": 1.0})
    with pytest.raises(ValueError, match="weight of adapter 'a' is nan; give a number"):
        set_adapters(running, {"a": float("nan")})
    kept = {one["layer"]: one for one in json.loads((out / "merge.json").read_text())["layers"]}
    assert kept.keys() == {layer for path in adapters for layer in read_pairs(path)}
    assert own.weight("proj_out").dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_then_rounded_once(kind: str, adapters: list[str], tmp_path: Path) -> None:
    """The quantized merge holds the codes that diffusers makes of the unquantized merge."""
    chosen = Trained(adapters[0])
    plain = merge(Merge(TINY, Precision("bf16"), adapter=chosen, out=str(tmp_path / "bf16"), device="cpu"))
    out = merge(Merge(TINY, Precision(kind), adapter=chosen, out=str(tmp_path / kind), device="cpu"))
    once = load_transformer(Model(str(plain)), Precision(kind), CPU)
    found = load_transformer(Model(str(out)), Precision(kind), CPU)
    for name, layer in linear_layers(once).items():
        assert torch.equal(dequantized(layer), dequantized(linear_layers(found)[name])), name
    body = json.loads((out / "merge.json").read_text())["layers"]
    base = load_transformer(TINY, Precision(kind), CPU)
    pairs = read_pairs(adapters[0])
    for one in body[::7]:
        pair = pairs[one["layer"]]
        update = pair.strength * pair.up @ pair.down
        change = dequantized(base_layers(found)[one["layer"]]) - dequantized(base_layers(base)[one["layer"]])
        assert one["survives"] == pytest.approx(float((change * update).sum() / update.square().sum()), abs=0.02)
    assert {path.name for path in (out / "transformer").iterdir()} == {
        path.name for path in (Path(TINY.path) / "transformer").iterdir()
    }
    assert "| layer | update % |" in (out / "merge.md").read_text()
    assert load_file(out / "vae" / "diffusion_pytorch_model.safetensors")


def test_merges_that_cannot_be(adapters: list[str], tmp_path: Path) -> None:
    quantized = save(Save(TINY, Precision("nf4"), str(tmp_path / "nf4"), "cpu"))
    small = Trained(adapters[0], weight=0.01)
    with pytest.raises(
        ValueError, match=r"is quantized already: merged straight into it, (\d+) % of the update"
    ) as caught:
        merge(Merge(Model(str(quantized)), Precision("nf4"), adapter=small, out=str(tmp_path / "no"), device="cpu"))
    assert int(str(caught.value).split(" % of")[0].split()[-1]) > 80
    for options, message in (
        (Merge(TINY, out=str(tmp_path / "no")), r"adapter\.path is null; give the LoRA file to merge"),
        (Merge(TINY, adapter=Trained(adapters[0]), out=str(quantized)), "give a folder that does not exist yet"),
        (Merge(TINY, adapter=Trained(str(tmp_path / "none")), out=str(tmp_path / "no")), "there is no adapter at"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4"]
    shutil.rmtree(quantized)


def test_switching_between_equal_ranks_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, another strength, another share of two: the same compiled blocks, and the right velocity."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(fast, "BACKEND", "eager")  # traced, and run as it is
    torch._dynamo.reset()
    precision = Precision("nf4", compute_dtype="fp32")
    transformer = load_transformer(TINY, precision, CPU)
    plain = load_transformer(TINY, precision, CPU)
    for name, alpha in (("a", 4), ("b", 12)):
        source = load_transformer(TINY, precision, CPU)
        attach(source, Adapter(rank=4, alpha=alpha, targets="attention+mlp"), seed=0)
        randomise(source, alpha)
        save_adapter(source, tmp_path / name, {})
        for one in (transformer, plain):
            load_adapter(one, str(tmp_path / name), name)
    fast.install(transformer, fast.Memory(compile=True), CPU)
    compiled = []
    with torch.no_grad():
        for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.3}, {"a": 1.0}):
            for one in (transformer, plain):
                set_adapters(one, weights)
            found = transformer(**inputs())[0]
            compiled.append(counters["stats"]["unique_graphs"])
            torch.testing.assert_close(found, plain(**inputs())[0], rtol=1e-3, atol=1e-4)
    assert compiled[0] > 0 and len(set(compiled)) == 1, compiled
