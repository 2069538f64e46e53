"""Products in fp16 beside a residual stream in fp32: against fp64 and fp32, at magnitudes that fp16 does not hold."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from infer.adapter.lora import Adapter
from infer.checkpoint.checks import check_stored
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family.packing import pack
from infer.fast import install as fast
from infer.fast.half import attend, scaled_product
from infer.fast.install import install
from infer.fast.memory import KEEP, Memory
from infer.program.note import note
from infer.quantize import compute
from infer.quantize.compute import compute_dtype, compute_dtype_of, product_dtype_of, small_dtype, stored_on
from infer.quantize.multiply import dequantize_to, multiply_plainly
from infer.quantize.precision import Precision
from infer.sample.encode import decode
from scripts.check.half_gradients import make_loud
from scripts.check.no_bf16 import NoBf16
from scripts.tiny.make_style import make_style
from tests.infer.fast.families import CPU, make, velocity
from train.data.dataset import Data
from train.loop import run as training
from train.objective.flow_matching import predict
from train.objective.optim import Optim
from train.run.config import Train
from train.train import train

CUDA = torch.device("cuda")
FP32 = Precision("nf4", compute_dtype="fp32")
FP16 = Precision("nf4", compute_dtype="fp16")
ADAPTERS = {
    "lora": Adapter(rank=4, targets="attention+mlp"),
    "dora": Adapter(rank=4, dora=True, targets="attention+mlp"),
    "all layers": Adapter(rank=4, targets="all"),
}


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is taken for one with products in fp16."""
    monkeypatch.setattr(compute, "_quick_on_cpu", lambda dtype: True)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a card without bf16."""

    def lacking(asked: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.float16 if asked == torch.bfloat16 else asked

    monkeypatch.setattr(compute, "compute_dtype", lacking)


def test_the_mode_sees_bf16() -> None:
    with NoBf16(), pytest.raises(AssertionError, match="bf16"):
        torch.ones(2).bfloat16()


def test_rows_of_any_magnitude_are_multiplied_to_fp16s_precision() -> None:
    noise = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([1e-25, 1e-9, 1.0, 7e4, 1e12])
    x = torch.randn(5, 256, generator=noise) * magnitudes[:, None]
    weights = (torch.randn(256, 96, generator=noise) / 16).half()
    exact = x.double() @ weights.double()
    found = scaled_product(x, weights)
    assert found.dtype == torch.float32
    assert float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-3
    assert not (x.half() @ weights)[3:].isfinite().all()  # what fp16 makes of the same
    assert not (x.half() @ weights)[:2].any()


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(4, 8)
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    found = scaled_product(x, torch.ones(8, 2).half())
    assert found[0].eq(0).all() and not found[1:3].isfinite().any() and found[3].eq(8).all()


@pytest.mark.parametrize("value, gradient", [(1.0, 1.0), (1e6, 1e-9), (1e-3, 1e8)])
def test_attention_and_its_gradient_at_any_magnitude(value: float, gradient: float) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k, v, given = (torch.randn(2, 3, 40, 64, generator=noise) for _ in range(4))
    v, given = v * value, given * gradient
    v[:, 1] *= 1e-4  # heads apart

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        parts = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*parts)
        return [out, *torch.autograd.grad(out, parts, given.to(dtype))]

    exact = run(functional.scaled_dot_product_attention, torch.float64)
    for found, wanted in zip(run(attend, torch.float32), exact, strict=True):
        assert found.dtype == torch.float32
        for head in range(3):
            assert float((found - wanted)[:, head].norm() / wanted[:, head].norm()) < 3e-3


def step(transformer: Any, parameters: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The velocity, and the gradients of all adapter parameters behind each other."""
    for parameter in parameters:
        parameter.grad = None
    out = velocity(transformer, torch.Generator().manual_seed(2), (2, 6, 10), dtype)
    (1e-6 * out.square().mean()).backward()  # gradients so small that plain fp16 has none
    return out.detach(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    "kind, adapter", [("nf4", "lora"), ("double", "dora"), ("int8", "all layers"), ("bf16", "lora")]
)
def test_gradients_are_those_of_fp32(kind: str, adapter: str, model: Model, half: None) -> None:
    options: dict[str, Any] = {"double_quant": True} if kind == "double" else {}
    kind = "nf4" if kind == "double" else kind
    plain = Precision("fp32") if kind == "bf16" else Precision(kind, "fp32", **options)
    exact = step(*make(plain, ADAPTERS[adapter], model), torch.float32)
    transformer, parameters = make(Precision(kind, "fp16", **options), ADAPTERS[adapter], model)
    assert compute_dtype_of(transformer) == torch.float32 and product_dtype_of(transformer) == torch.float16
    assert {p.dtype for p in transformer.parameters()} <= {torch.float32, torch.float16, torch.uint8, torch.int8}
    paths: dict[str, Callable[[], object]] = {"plain": lambda: None}
    paths |= {keep: partial(install, transformer, Memory(keep=keep), CPU) for keep in KEEP}
    for path, prepare in paths.items():
        prepare()
        with NoBf16():
            found = step(transformer, parameters, torch.float32)
        # fp16 rounds by 2^-11, bf16 by 2^-8
        assert apart(found[0], exact[0]) < 2e-3 and apart(found[1], exact[1]) < 3e-3, path


def test_compiled_is_the_same(klein: Model, half: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced, differentiated and partitioned as on a GPU, but not lowered to kernels
    monkeypatch.setattr(fast, "BACKEND", "aot_eager")
    transformer, parameters = make(FP16, ADAPTERS["lora"], klein)
    exact = step(*make(FP32, ADAPTERS["lora"], klein), torch.float32)
    install(transformer, Memory(keep="everything", compile=True), CPU)
    found = step(transformer, parameters, torch.float32)
    assert apart(found[0], exact[0]) < 2e-3 and apart(found[1], exact[1]) < 3e-3


def test_activations_far_beyond_fp16_stay_near_fp32(tiny: Model, half: None) -> None:
    bf16 = Precision("nf4", compute_dtype="bf16")
    by = 1e6
    transformer, parameters = make(FP32, ADAPTERS["lora"], tiny)
    make_loud(transformer, by)
    seen: list[float] = []
    layer = transformer.single_transformer_blocks[2].proj_out
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].detach().abs().max())))
    exact = step(transformer, parameters, torch.float32)
    assert seen[0] > by

    transformer, parameters = make(FP16, ADAPTERS["lora"], tiny)
    make_loud(transformer, by)
    errors = []
    for prepare in (lambda: None, lambda: install(transformer, Memory(), CPU)):
        prepare()
        found = step(transformer, parameters, torch.float32)
        errors.append((apart(found[0], exact[0]), apart(found[1], exact[1])))
    transformer, parameters = make(bf16, ADAPTERS["lora"], tiny)
    make_loud(transformer, by)
    install(transformer, Memory(), CPU)
    found = step(transformer, parameters, torch.bfloat16)
    wide = apart(found[0], exact[0]), apart(found[1], exact[1])
    for output, gradients in errors:
        assert output < 0.5 * wide[0] and gradients < 0.5 * wide[1], (by, errors, wide)


def test_plain_fp16_does_not_hold_them(tiny: Model) -> None:
    # the residual stream and all else in fp16, as diffusers runs it; products in fp32 for the CPU's sake
    transformer = FluxTransformer2DModel.from_pretrained(f"{tiny.path}/transformer", torch_dtype=torch.float16)
    make_loud(transformer, 1e4)
    with torch.no_grad():
        config, noise = transformer.config, torch.Generator().manual_seed(2)
        x = torch.randn(1, config.in_channels // 4, 4, 4, generator=noise)
        t5 = torch.randn(1, 8, config.joint_attention_dim, generator=noise)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=noise)
        velocity = predict(transformer, x, t5, pooled, torch.tensor([0.5]), 1.0, torch.float16)
    assert velocity.isnan().any()


def test_llm_int8_takes_rows_beyond_fp16(tiny: Model, half: None) -> None:
    transformer = load_transformer(tiny, Precision("int8", "fp16", llm_int8=True), CPU)
    layer: Any = transformer.single_transformer_blocks[0].proj_out
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e6]] * 3)
    found = layer(x)
    del layer.forward
    multiply_plainly(layer)  # dequantized, products in fp32
    exact = layer(x)
    assert all(apart(a, b) < 0.03 for a, b in zip(found, exact, strict=True))


def test_a_card_without_bf16_stores_and_multiplies_in_fp16(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    note.cache_clear()
    monkeypatch.setattr(compute, "_bf16_on_card", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert stored_on(Precision("nf4"), CUDA) == FP16 and stored_on(Precision("bf16"), CUDA).dtype == torch.float16
    assert stored_on(FP32, CUDA) == FP32 and stored_on(Precision("fp32"), CUDA) == Precision("fp32")
    assert stored_on(Precision("nf4"), CPU) == Precision("nf4")
    assert small_dtype(CUDA) == torch.float32 and compute_dtype(torch.float16, CUDA) == torch.float16
    said = capfd.readouterr().err.splitlines()
    (line,) = [line for line in said if "this CPU" not in line]  # once
    assert line.startswith("note: Tesla T4 has no bf16: products in fp16")
    note.cache_clear()


def test_a_checkpoint_saved_for_bf16_is_dequantized_to_fp16(tiny: Model) -> None:
    stored = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False}
    check_stored("saved", stored, FP16, "transformer")
    with pytest.raises(
        ValueError, match=r"bnb_4bit_compute_dtype=bfloat16, but precision.compute_dtype asks for float32"
    ):
        check_stored("saved", stored, FP32, "transformer")
    transformer = load_transformer(tiny, Precision("nf4"), CPU)
    dequantize_to(transformer, torch.float16)
    layer: Any = transformer.proj_out
    assert layer.weight.quant_state.dtype == layer.compute_dtype == torch.float16


def test_the_autoencoder_of_such_a_card_decodes_in_tiles(tiny: Model) -> None:
    vae = load_vae(tiny, CPU, torch.float32)
    config, noise = vae.config, torch.Generator().manual_seed(0)
    smooth = torch.randn(1, config.latent_channels, 17, 2, generator=noise)
    packed = pack(functional.interpolate(smooth, (68, 8), mode="bicubic"))
    whole = np.asarray(decode(vae, packed, 544, 64), dtype=float)
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.decode_in_tiles = 512, 64, True
    tiled = np.asarray(decode(vae, packed, 544, 64), dtype=float)
    assert tiled.shape == whole.shape and not np.array_equal(tiled, whole)
    # each tile's norms and attention see less than the whole; a seam at a wrong place would move the picture
    assert np.abs(tiled - whole).mean() < 0.2 * np.abs(np.roll(whole, 16, axis=0) - whole).mean()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_style(folder, 4, seed=1)
    return folder


def test_a_run_on_a_card_without_bf16_learns_as_in_fp32(
    tiny: Model, pictures: Path, tmp_path: Path, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(precision: Precision) -> dict[str, float]:
        job = Train(
            model=tiny,
            precision=precision,
            adapter=Adapter(rank=4),
            data=Data(str(pictures), 64, 2, "zelk style", 0.25, cache=str(tmp_path / "cache")),
            optim=Optim(lr=1e-3),
            run=precision.compute_dtype,
            previews=[],
            steps=2,
            validate_every=0,
            validation_levels=1,
            device="cpu",
        )
        lines = (train(job).parent / "metrics.jsonl").read_text().splitlines()
        names = "loss", "validation_loss"
        rows = map(json.loads, lines)
        return {f"{name} {row['step']}": row[name] for row in rows for name in names if name in row}

    exact = run(FP32)
    fit = training.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        with NoBf16():
            return fit(*args, **kwargs)

    monkeypatch.setattr(training, "fit", watched)
    found = run(Precision("nf4"))
    assert found.keys() == exact.keys() and found["validation_loss 2"] < found["validation_loss 0"]
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=3e-3), name
