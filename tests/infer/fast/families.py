"""One transformer of each family for the fast path's tests: how it is loaded, adapted and called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.adapter.targets import BLOCKS
from infer.checkpoint.load import Model, load_transformer
from infer.fast.half import compute_in_half
from infer.quantize.compute import compute_dtype, compute_in
from infer.quantize.precision import Precision, check_quantized, dequantize_to, keep_layout, multiply_plainly
from infer.quantize.quantizer import quantization_config, quantizing_on
from infer.sample.encode import pack
from train.objective.flow_matching import predict

CPU = torch.device("cpu")
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj|to_out)"
FLUX2_TARGETS = {
    "attention": BLOCKS + ATTENTION,
    "attention+mlp": rf"{BLOCKS}({ATTENTION}|ff(_context)?\.linear_(in|out))",
}


def make_klein(folder: Path) -> Model:
    """A random FLUX.2 klein of 128 wide, with as many blocks as the bundled model."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformer = Flux2Transformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        )
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:  # norms
                parameter.data.uniform_(0.5, 1.5)
            if "modulation" in name:  # gates near 0 would leave little of what the blocks do
                parameter.data *= 10
    transformer.bfloat16().save_pretrained(folder / "transformer")
    return Model(str(folder))


def is_flux2(model: Model) -> bool:
    assert model.local is not None
    return "Flux2Transformer2DModel" in (model.local / "transformer" / "config.json").read_text()


def load(model: Model, precision: Precision) -> Any:
    """A family's transformer at a precision on the CPU."""
    if not is_flux2(model):
        return load_transformer(model, precision, CPU)
    options: dict[str, Any] = {"torch_dtype": precision.dtype, "subfolder": "transformer"}
    if precision.quantized:
        with quantizing_on(CPU, CPU):
            config = quantization_config(precision, diffusers)
            transformer = Flux2Transformer2DModel.from_pretrained(
                model.path, quantization_config=config, device_map={"": CPU}, **options
            )
    else:
        transformer = Flux2Transformer2DModel.from_pretrained(model.path, **options)
    check_quantized(transformer, precision)
    keep_layout(transformer)
    dtype = compute_dtype(precision.dtype, CPU)
    if dtype != precision.dtype:
        compute_in(transformer, dtype)
    elif dtype == torch.float16:
        dequantize_to(transformer, dtype)
        compute_in_half(transformer, precision.llm_int8)
    if dtype != torch.float16 and not precision.llm_int8:
        multiply_plainly(transformer)
    return transformer.eval().requires_grad_(False)


def adapter_for(model: Model, adapter: Adapter) -> Adapter:
    """The adapter with its preset of layers written out where the presets know FLUX.1's names alone."""
    return replace(adapter, targets=FLUX2_TARGETS.get(adapter.targets, adapter.targets)) if is_flux2(model) else adapter


def make(precision: Precision, adapter: Adapter, model: Model) -> tuple[Any, list[Tensor]]:
    transformer = load(model, precision).train()
    parameters: list[Tensor] = list(attach(transformer, adapter_for(model, adapter), 0))
    noise = torch.Generator().manual_seed(1)
    for parameter in parameters:  # B starts as zero: its layer would learn nothing about A
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    return transformer, parameters


def velocity(transformer: Any, noise: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """What the transformer says of random latents; shape: how many, and their height and width in latents."""
    config, (batch, height, width) = transformer.config, shape
    x = torch.randn(batch, config.in_channels // 4, height, width, generator=noise)
    text = torch.randn(batch, 20, config.joint_attention_dim, generator=noise)
    if not isinstance(transformer, Flux2Transformer2DModel):
        pooled = torch.randn(batch, config.pooled_projection_dim, generator=noise)
        return predict(transformer, x, text, pooled, torch.rand(batch, generator=noise), 1.0, dtype)
    rows, columns, one = torch.arange(height // 2), torch.arange(width // 2), torch.arange(1)
    found: Tensor = transformer(
        hidden_states=pack(x).to(dtype),
        encoder_hidden_states=text.to(dtype),
        timestep=torch.tensor([0.25, 0.5])[:batch],  # diffusers rounds them, and 1000 times them, to bf16
        img_ids=torch.cartesian_prod(one, rows, columns, one),
        txt_ids=torch.cartesian_prod(one, one, one, torch.arange(20)),
        return_dict=False,
    )[0]
    return found.float()
