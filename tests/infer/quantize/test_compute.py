"""On a CPU without quick bf16 everything computes in fp32: the figures, against weights unpacked by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.text import load_text_parts
from infer.fast.install import install
from infer.fast.memory import Memory
from infer.program.note import note
from infer.program.paths import ROOT
from infer.quantize import compute
from infer.quantize.compute import compute_dtype, compute_dtype_of
from infer.quantize.precision import Precision, linear_layers
from infer.quantize.storage import dequantized, stored_bytes
from infer.sample.encode import decode, to_posterior
from infer.sample.generate import mend_of
from scripts.tiny.make_style import make_style
from tests.forked import Forked

CPU = torch.device("cpu")
SLOW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    note.cache_clear()
    monkeypatch.setattr(compute, "_quick_on_cpu", lambda dtype: False)
    yield
    note.cache_clear()


def test_what_a_cpu_computes_in(slow_bf16: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert compute_dtype(torch.float32, CPU) == torch.float32 and not capfd.readouterr().err
    for _ in range(2):
        assert compute_dtype(torch.bfloat16, CPU) == torch.float32
    assert capfd.readouterr().err.splitlines() == [
        "note: this CPU has no quick bf16: computing in fp32 (weights are stored as asked)"
    ]
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_a_limit_on_the_instructions_is_heard() -> None:
    code = (
        "import torch; from infer.quantize.compute import compute_dtype; "
        "print(compute_dtype(torch.bfloat16, torch.device('cpu')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | SLOW, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "torch.float32"


def inputs(transformer: Any) -> dict[str, Any]:
    own = torch.Generator().manual_seed(0)
    dtype = compute_dtype_of(transformer)
    return {
        "hidden_states": torch.randn(2, 64, 64, generator=own).to(dtype),
        "encoder_hidden_states": torch.randn(2, 40, 128, generator=own).to(dtype),
        "pooled_projections": torch.randn(2, 128, generator=own).to(dtype),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(40, 3),
        "return_dict": False,
    }


def unpacked(precision: Precision) -> Any:
    """The bundled transformer as plain fp32 layers that hold the values which a precision stores."""
    exact = load_transformer(Model("scripts/tiny/model"), Precision("fp32"), CPU)
    layers = linear_layers(load_transformer(Model("scripts/tiny/model"), precision, CPU))
    for name, layer in linear_layers(exact).items():
        state = getattr(layers[name].weight, "quant_state", None)
        if state is not None:
            state.dtype = torch.float32  # what bitsandbytes dequantizes to, and would round by
        layer.weight.data = dequantized(layers[name]).clone()
    return exact


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "fp4", "int8"])
def test_a_transformer_computes_in_fp32(kind: str, fused: bool, slow_bf16: None) -> None:
    precision = Precision(kind)
    transformer = load_transformer(Model("scripts/tiny/model"), precision, CPU)
    assert compute_dtype_of(transformer) == torch.float32 and transformer.dtype == torch.bfloat16
    size = stored_bytes(transformer)
    if fused:
        install(transformer, Memory(keep="everything"), CPU)
    with torch.no_grad():
        found = transformer(**inputs(transformer))[0]
        exact = unpacked(precision)(**inputs(transformer))[0]
    assert found.dtype == torch.float32
    # bf16 products would be off by 2^-8
    assert (found - exact).norm() < 2e-5 * exact.norm()
    assert stored_bytes(transformer) == size
    assert {p.dtype for p in transformer.parameters() if p.is_floating_point()} <= {torch.bfloat16}


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_gradients_in_fp32(kind: str, slow_bf16: None) -> None:
    """The adapters' gradients are those of plain fp32 layers, on PEFT's own path with checkpointing."""
    gradients = []
    for transformer in (
        load_transformer(Model("scripts/tiny/model"), Precision(kind), CPU),
        unpacked(Precision(kind)),
    ):
        parameters = attach(transformer, Adapter(rank=4), seed=0)
        for i, parameter in enumerate(parameters):
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(i))
        transformer.train().enable_gradient_checkpointing()
        velocity = transformer(**inputs(transformer))[0]
        functional.mse_loss(velocity, torch.ones_like(velocity)).backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        )
    assert len(gradients[0]) == len(gradients[1])
    # bitsandbytes unpacks 4-bit weights to the stored dtype for the input's gradient
    near = 4e-3 if kind == "nf4" else 1e-4
    assert (gradients[0] - gradients[1]).norm() < near * gradients[1].norm()


def test_the_other_parts_compute_in_fp32(tiny: Model, slow_bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> tuple[Any, Any, Any]:
        text = load_text_parts(tiny, Precision("nf4", t5="bf16"), CPU)
        return text["text_encoder"], text["text_encoder_2"], load_vae(tiny, CPU)

    ours = parts()
    with monkeypatch.context() as quick:
        quick.setattr(compute, "_quick_on_cpu", lambda dtype: True)
        exact = parts()
    for part, plain in zip(ours, exact, strict=True):
        assert part.dtype == plain.dtype == torch.bfloat16 and stored_bytes(part) == stored_bytes(plain)
        plain.float()
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        for part, plain in zip(ours[:2], exact[:2], strict=True):
            found, expected = part(tokens)[0], plain(tokens)[0]
            assert found.dtype == torch.float32
            assert (found - expected).norm() < 1e-6 * expected.norm()
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mean, _ = to_posterior(ours[2], pixels)
        expected = exact[2].encode(pixels).latent_dist.mean
        assert mean.dtype == torch.bfloat16  # what a cache stores
        assert (mean.float() - expected).norm() < 4e-3 * expected.norm()
    packed = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    theirs = decode(exact[2], packed, 64, 64)
    difference = torch.tensor(list(decode(ours[2], packed, 64, 64).tobytes())) - torch.tensor(list(theirs.tobytes()))
    assert difference.abs().max() <= 1


class Rounded(TorchDispatchMode):
    """Notes every operation that makes a floating tensor of less than fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16]
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float32 for one in tree_leaves(args)) and made:
            self.found.append(f"{func} {[tuple(one.shape) for one in made]}")
        return out


@pytest.mark.parametrize("t5", ["bf16", "nf4", "int8"])
def test_no_activation_is_rounded_on_the_way(t5: str, tiny: Model, slow_bf16: None) -> None:
    """Libraries ask weights for their dtype, and cast what they multiply with them."""
    text = load_text_parts(tiny, Precision("nf4", t5=t5), CPU)
    vae = load_vae(tiny, CPU)
    tokens = torch.arange(3, 35)[None]
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), Rounded() as rounded:
        for part in ("text_encoder", "text_encoder_2"):
            text[part](tokens)
        vae.decode(vae.encode(pixels).latent_dist.mean)
    assert not rounded.found


def test_a_run_comes_to_the_same_figures(tmp_path: Path) -> None:
    """Some steps on a CPU held to AVX2, and the same steps the usual way."""
    make_style(tmp_path / "pictures", 8, seed=1)
    losses = []
    for name, limits in (("slow", SLOW), ("usual", {})):
        command = [str(ROOT / "train" / "train.py"), f"run={name}", "model=tiny", "precision=nf4"]
        command += [f"model.path={ROOT / 'scripts/tiny/model'}", "data.path=pictures", "data.resolution=64", "steps=4"]
        command += ["data.batch_size=2", "optim.lr=1e-3", "optim.warmup=0", f"data.cache=cache-{name}"]
        command += ["validate_every=4", "data.validation=0.25", "validation_levels=2", "previews=[]"]
        if limits:  # the library reads them once
            done = subprocess.run(
                [sys.executable, *command], cwd=tmp_path, env=os.environ | limits, capture_output=True, text=True
            )
            code, said = done.returncode, done.stderr
        else:
            code, said = Forked(command, tmp_path, os.environ, tmp_path / "log").finish(300)
        assert code == 0, said[-2000:]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([one["validation_loss"] for one in map(json.loads, lines) if "validation_loss" in one])
        slow = not compute._quick_on_cpu(torch.bfloat16) or bool(limits)
        assert ("computing in fp32" in said) == slow
    (first, last), usual = losses
    assert (first, last) == pytest.approx(usual, rel=5e-3)
    assert last < first


def test_fp16_is_blamed_where_it_multiplies_alone(tiny: Model) -> None:
    transformer = load_transformer(tiny, Precision("fp32"), CPU).half()  # nothing casts yet
    assert mend_of(transformer).startswith("fp16 may not hold its activations: set compute_dtype=bf16 or fp32")
    compute.compute_in(transformer, torch.float32)  # as on a CPU, whatever is stored
    assert transformer.dtype == torch.float16 and mend_of(transformer) == "the checkpoint may be damaged"
