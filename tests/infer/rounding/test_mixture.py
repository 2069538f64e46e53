"""Layers of several kinds in one transformer: loaded, checked, adapted, chosen under a budget, measured one by one."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter, strengths
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_scheduler, load_transformer
from infer.checkpoint.model import Model
from infer.fast.install import Memory, choose_path, uninstall
from infer.fast.weights import groups, obstacle
from infer.quantize import compute
from infer.quantize.layer import quantized_values
from infer.quantize.precision import Precision, kind_asked, kind_of, linear_layers
from infer.quantize.storage import dequantized, stored_bytes, weight_bytes
from infer.rounding.budget import LADDER, Mixture, choose
from infer.rounding.layer_errors import calls_of, decide, kept_file, measure
from infer.rounding.records import Record, record, velocities
from infer.rounding.settings import Sensitivity
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw
from infer.save import Save, save
from infer.sensitivity import sensitivity

CPU = torch.device("cpu")
KINDS = {
    r"transformer_blocks\.0\..*": "int8",
    r"single_transformer_blocks\.1\.(attn\..*|proj_mlp)": "bf16",
    "proj_out": "fp4",  # the model's own alone, not the blocks'
}
MIXED = Precision("nf4", layers=KINDS)


def bytes_of(layer: torch.nn.Linear, kind: str, double_quant: bool) -> int:
    return weight_bytes(layer.out_features, layer.in_features, kind, double_quant)


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_each_layer_is_stored_as_asked(weights: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny
    if weights == "random":
        import infer.family.find

        small = {"transformer": json.loads((Path(tiny.path) / "transformer" / "config.json").read_text())}
        small["index"] = {"_class_name": "FluxPipeline"}
        small["transformer"] = {k: v for k, v in small["transformer"].items() if not k.startswith("_")}
        monkeypatch.setitem(infer.family.find.SIZES, "small", small)
        model = Model("small", weights="random")
    mixed = load_transformer(model, MIXED, CPU)
    kinds = {name: kind_of(layer) for name, layer in linear_layers(mixed).items()}
    assert kinds["transformer_blocks.0.ff.net.2"] == "int8" and kinds["transformer_blocks.1.ff.net.2"] == "nf4"
    assert kinds["single_transformer_blocks.1.proj_mlp"] is None and kinds["proj_out"] == "fp4"
    assert kinds["single_transformer_blocks.1.proj_out"] == "nf4"
    assert kinds == {name: kind_asked(MIXED, name) for name in kinds}
    if weights == "random":
        return
    for kind in ("int8", "fp4", "nf4", "bf16"):
        whole = linear_layers(load_transformer(model, Precision(kind), CPU))
        for name, layer in linear_layers(mixed).items():
            if (kinds[name] or "bf16") == kind:
                assert torch.equal(dequantized(layer), dequantized(whole[name])), name
    sizes = sum(bytes_of(layer, kinds[name] or "bf16", False) for name, layer in linear_layers(mixed).items())
    plain = load_transformer(model, Precision("bf16"), CPU)
    others = stored_bytes(plain) - sum(2 * layer.weight.numel() for layer in linear_layers(plain).values())
    assert stored_bytes(mixed) == sizes + others
    few = load_transformer(model, Precision("bf16", layers={"proj_out": "nf4"}), CPU)
    assert [name for name, layer in linear_layers(few).items() if kind_of(layer)] == ["proj_out"]


def test_bytes_of_a_double_quantized_layer(tiny: Model) -> None:
    double = load_transformer(tiny, Precision("nf4", double_quant=True), CPU)
    layers = linear_layers(double)
    plain = load_transformer(tiny, Precision("bf16"), CPU)
    others = stored_bytes(plain) - sum(2 * layer.weight.numel() for layer in linear_layers(plain).values())
    assert stored_bytes(double) == others + sum(bytes_of(layer, "nf4", True) for layer in layers.values())


def picture(transformer: Any, tiny: Model) -> torch.Tensor:
    with text_encoder(tiny, Precision("bf16"), CPU, None) as encoder:
        (text,) = encoder(["a red star"])
    return draw(transformer, load_scheduler(tiny), text, 0, Sampling(2, 3.5), (128, 128), CPU).float()


def test_a_mixture_takes_the_fast_path_and_an_adapter(tiny: Model, tmp_path: Path) -> None:
    transformer = load_transformer(tiny, MIXED, CPU)
    plain = picture(transformer, tiny)
    said: list[str] = []
    path, _ = choose_path(transformer, Memory(keep="nothing"), MIXED, CPU, said.append)
    assert path.fused and not said
    assert (picture(transformer, tiny) - plain).norm() < 0.02 * plain.norm()
    parameters = attach(transformer, Adapter(rank=2, targets="attention+mlp"), seed=0)
    assert len(strengths(transformer)) == 44 and all(parameter.dtype == torch.float32 for parameter in parameters)
    uninstall(transformer)
    for parameter in parameters:
        parameter.data += 0.02
    save_adapter(transformer, tmp_path, {})
    other = load_transformer(tiny, MIXED, CPU)
    load_adapter(other, str(tmp_path), "mine")
    changed = picture(transformer, tiny)
    assert (picture(other, tiny) - changed).norm() < 0.02 * changed.norm()
    assert (changed - plain).norm() > 0.1 * plain.norm()


def test_a_split_group_takes_the_plain_path_and_says_so(tiny: Model) -> None:
    split = Precision("nf4", layers={r"single_transformer_blocks\.2\.attn\.to_k": "int8"})
    transformer = load_transformer(tiny, split, CPU)
    said: list[str] = []
    path, _ = choose_path(transformer, Memory(), split, CPU, said.append)
    assert not path.fused
    (line,) = said
    assert "single_transformer_blocks.2.proj_mlp, to_q, to_k, to_v read one input and are stored as" in line
    assert "int8 and nf4" in line
    attach(transformer, Adapter(rank=2), seed=0)
    assert "read one input" in str(obstacle(transformer))
    with pytest.raises(ValueError, match=r"memory.compile=True needs the fast path, but single_"):
        choose_path(transformer, Memory(compile=True), split, CPU, said.append)


def test_what_cannot_be_mixed(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"precision.layers names 'no_such', but no linear layer of the model has that"
    ):
        load_transformer(tiny, Precision("nf4", layers={"no_such": "int8"}), CPU)
    for precision in (MIXED, Precision("auto", budget_gib=8)):
        with pytest.raises(ValueError, match="is a mixture of kinds, which is made while a checkpoint is read"):
            save(Save(tiny, precision, str(tmp_path / "out"), "cpu"))
    assert Precision("auto", budget_gib=8).for_t5().kind == "nf4"


def made_up(seed: int, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(count, generator=generator).tolist()
    sizes = torch.randint(1, 6, (count,), generator=generator).tolist()
    groups = [
        {
            "layers": [f"transformer_blocks.{i}.ff.net.2"],
            "errors": {"nf4": error, "int8": 0.01 * error, "bf16": 0.0},
            "bytes": {"nf4": 100 * size, "int8": 190 * size, "bf16": 360 * size},
        }
        for i, (error, size) in enumerate(zip(errors, sizes, strict=True))
    ]
    return {"other_bytes": 50, "groups": groups}


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_near_the_best_of_all(seed: int) -> None:
    found = made_up(seed, 6)
    least = 50 + sum(group["bytes"]["nf4"] for group in found["groups"])
    for share in (1.0, 1.2, 1.5, 2.0, 4.0):
        budget = int(least * share)
        best = min(
            sum(group["errors"][kind] for group, kind in zip(found["groups"], kinds, strict=True))
            for kinds in itertools.product(LADDER, repeat=6)
            if 50 + sum(group["bytes"][kind] for group, kind in zip(found["groups"], kinds, strict=True)) <= budget
        )
        mixture = choose(found, budget, "budget")
        own = {names[0]: kind for names, kind in mixture.kinds}
        taken = 50 + sum(group["bytes"][own[group["layers"][0]]] for group in found["groups"])
        assert mixture.total_bytes == taken <= budget
        # greedy: within the largest single step of the best
        assert best - 1e-9 <= mixture.error**2 <= best + max(group["errors"]["nf4"] for group in found["groups"])
    assert {kind for _, kind in choose(found, 10**9, "budget").kinds} == {"bf16"}
    with pytest.raises(
        ValueError, match=r"precision.budget_gib is .*, but the transformer takes .* with every layer NF4"
    ):
        choose(found, least - 1, "precision.budget_gib")


def test_patterns_say_the_mixture_and_nothing_else(tiny: Model) -> None:
    names = groups(linear_layers(load_transformer(tiny, Precision("bf16"), CPU)))
    assert [
        name for group in names for name in group if "single_transformer_blocks.0.attn" in name and "to_v" not in name
    ] == ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k"]
    assert sum(len(group) == 4 for group in names) == 4 and sum(len(group) == 3 for group in names) == 4
    pairs = [(group, LADDER[i % 3]) for i, group in enumerate(names)]
    precision = Precision("nf4", layers=Mixture(pairs, 0, 0.0, 0.0).layers())
    for group, kind in pairs:
        for name in group:
            assert (kind_asked(precision, name) or "bf16") == kind, name


@pytest.mark.parametrize("kind, double", [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
def test_quantized_values_are_those_of_a_loaded_layer(kind: str, double: bool, tiny: Model) -> None:
    plain = linear_layers(load_transformer(tiny, Precision("bf16"), CPU))
    loaded = linear_layers(load_transformer(tiny, Precision(kind, double_quant=double), CPU))
    for name in ("transformer_blocks.0.attn.to_q", "proj_out", "single_transformer_blocks.3.proj_out"):
        own = quantized_values(plain[name].weight.data, kind, double, torch.bfloat16)
        torch.testing.assert_close(own.float(), dequantized(loaded[name]).bfloat16().float(), rtol=2**-8, atol=1e-7)


@pytest.fixture
def short(tiny: Model) -> Sensitivity:
    return Sensitivity(tiny, ["a red star"], Sampling(steps=1), run="test", device="cpu")


def recorded(transformer: FluxTransformer2DModel, options: Sensitivity) -> list[Record]:
    how = options.prompts, 0, options.sampling, (128, 128), CPU
    records = record(transformer, options.model, Precision("bf16"), *how)
    return calls_of(records, options.sampling.steps, transformer, CPU)


@pytest.mark.parametrize("quick, near", [(True, 0.1), (False, 1e-3)])
def test_a_layers_error_is_that_of_a_model_with_it_alone(
    quick: bool, near: float, short: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against loading the transformer with that group quantized by the library; on a CPU with quick bf16 products,
    whose own rounding is most of int8's error here, and on one that computes in fp32."""
    monkeypatch.setattr(compute, "_quick_on_cpu", lambda dtype: quick)
    chosen = [["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k", "transformer_blocks.1.attn.to_v"]]
    monkeypatch.setattr("infer.rounding.layer_errors.groups", lambda layers: chosen)
    transformer = load_transformer(short.model, Precision("bf16"), CPU)
    calls = recorded(transformer, short)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    (group,) = measure(transformer, calls, False, lambda: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())
    exact = velocities(transformer, calls, CPU)
    for kind in ("nf4", "int8"):
        alone = Precision("bf16", layers={r"transformer_blocks\.1\.attn\.to_[qkv]": kind})
        off = velocities(load_transformer(short.model, alone, CPU), calls, CPU) - exact
        expected = float((off.norm() / exact.norm()) ** 2)
        assert group["errors"][kind] == pytest.approx(expected, rel=near)
    assert group["errors"]["int8"] < group["errors"]["nf4"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_auto_measures_once_and_its_yaml_says_the_same(short: Sensitivity, elsewhere: Path) -> None:
    plain = load_transformer(short.model, Precision("nf4"), CPU)
    budget = 1.2 * stored_bytes(plain) / 2**30
    file = sensitivity(replace(short, budget_gib=budget, out="mine.yaml"))
    assert (file.parent / "sensitivity.png").stat().st_size > 10_000
    values = yaml.safe_load(Path("mine.yaml").read_text())
    said: list[str] = []
    decided = decide(short.model, Precision("auto", budget_gib=budget), CPU, said.append)
    assert asdict(decided) == values == asdict(Precision("nf4", layers=values["layers"]))
    assert len(said) == 1 and "predicted error of the velocity" in said[0]  # the command's measurement was used
    assert kept_file(short.model, False).is_file() and not kept_file(short.model, True).exists()
    mixed = load_transformer(short.model, decided, CPU)
    assert 1.1 < stored_bytes(mixed) / stored_bytes(plain) <= 1.2
    assert decide(short.model, decided, CPU, said.append) is decided
    with pytest.raises(ValueError, match=r"precision.budget_gib is 0.001, but the transformer takes"):
        decide(short.model, Precision("auto", budget_gib=0.001), CPU, said.append)
    # the mixture is better than NF4 where it was measured
    transformer = load_transformer(short.model, Precision("bf16"), CPU)
    calls = recorded(transformer, short)
    exact = velocities(transformer, calls, CPU)
    assert (velocities(mixed, calls, CPU) - exact).norm() < 0.8 * (velocities(plain, calls, CPU) - exact).norm()
