"""(prompt, seed) -> picture. The noise of a seed is the same for every precision, dtype and adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from torch import Tensor

    from infer.sample.encode import Text

from infer.program.bounds import check_most


@dataclass
class Sampling:
    """How pictures are drawn."""

    steps: int = 28
    """Denoising steps of a picture: more take longer, and 20 to 50 are usual."""
    guidance: float = 3.5
    """The distilled guidance of FLUX.1-dev; without effect on schnell."""
    height: int | None = None
    """Pixels, a multiple of 16; null takes the size that the checkpoint was made for."""
    width: int | None = None
    """Pixels, as height."""

    def __post_init__(self) -> None:
        check_most(self, "sampling.", steps=10**4, guidance=10**4, height=2**14, width=2**14)
        if self.steps < 1:
            raise ValueError(f"sampling.steps is {self.steps}; it must be 1 or more")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 16 or value % 16):
                near = max(16, round(value / 16) * 16)
                raise ValueError(f"sampling.{name} is {value}; FLUX draws multiples of 16, such as {near}")

    def size(self, default: int) -> tuple[int, int]:
        """Height and width in pixels of the pictures; `default` in place of what is null."""
        return self.height or default, self.width or default


def noise(seed: int, height: int, width: int, channels: int) -> Tensor:
    """Packed noise [1, tokens, channels * 4] of a picture of height x width pixels, drawn in fp32 on the CPU."""
    import torch

    from infer.sample.encode import FACTOR, pack

    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn((1, channels, height // FACTOR, width // FACTOR), generator=generator))


def draw(
    transformer: FluxTransformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    text: Text,
    seed: int,
    sampling: Sampling,
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """One picture's packed latents [1, tokens, channels * 4]. `size` is height and width in pixels.

    Raises:
        NotFiniteError: the transformer's output is NaN or infinite, of which a picture shows nothing.
    """
    import torch
    from diffusers import FluxPipeline

    from infer.fast.cuda_graph import Sampler
    from infer.quantize.compute import compute_dtype_of
    from infer.sample.encode import NotFiniteError

    pipeline = FluxPipeline(
        scheduler=scheduler,
        transformer=transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(transformer.forward, Sampler):
        transformer.forward.refresh()
    dtype = compute_dtype_of(transformer)
    height, width = size
    with torch.no_grad():
        latents: Tensor = pipeline(
            prompt_embeds=text.t5[None].to(device, dtype),
            pooled_prompt_embeds=text.pooled[None].to(device, dtype),
            latents=noise(seed, height, width, transformer.config.in_channels // 4).to(device, dtype),
            height=height,
            width=width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="latent",
        ).images
    if not latents.isfinite().all():
        share = 1 - float(latents.isfinite().float().mean())
        raise NotFiniteError(
            f"the picture of seed {seed} is not finite ({100 * share:.0f} % of its latents); {mend_of(transformer)}"
        )
    return latents


def mend_of(transformer: FluxTransformer2DModel) -> str:
    """What to do about a transformer whose output is not finite."""
    mends = ["the checkpoint may be damaged"]
    if getattr(transformer, "peft_config", {}):
        mends.insert(0, "the adapter may be ruined or its weight too high")
    if str(transformer.dtype) == "torch.float16":
        mends.insert(0, "fp16 may not hold its activations: set compute_dtype=bf16 or fp32 in its precision")
    return "; ".join(mends)
