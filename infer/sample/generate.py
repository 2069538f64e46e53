"""(prompt, seed) -> picture. The noise of a seed is the same for every precision, dtype and adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from infer.program.bounds import check_most

if TYPE_CHECKING:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from torch import Tensor

    from infer.checkpoint.model import Model
    from infer.family.family import Text


@dataclass
class Sampling:
    """How pictures are drawn."""

    steps: int | None = None
    """Denoising steps of a picture, each of two calls where guidance takes two; null takes the checkpoint's own."""
    guidance: float | None = None
    """How closely a prompt is followed; null takes the checkpoint's own. An embedding in FLUX.1-dev and FLUX.2-dev, the
    weight between calls with and without the prompt in klein's base; without effect on schnell and distilled klein."""
    height: int | None = None
    """Pixels, a multiple of 16; null takes the size that the checkpoint was made for."""
    width: int | None = None
    """Pixels, as height."""
    model: str | None = None
    """A second checkpoint on which the adapter is drawn too, with its own steps and guidance, by train.py's previews
    and by compare.py: `distilled` (klein's own, of its base), a name that model=... takes, a folder or a Hub id."""

    def __post_init__(self) -> None:
        check_most(self, "sampling.", steps=10**4, guidance=10**4, height=2**14, width=2**14)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"sampling.steps is {self.steps}; it must be 1 or more")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 16 or value % 16):
                near = max(16, round(value / 16) * 16)
                raise ValueError(f"sampling.{name} is {value}; FLUX draws multiples of 16, such as {near}")

    def size(self, default: int) -> tuple[int, int]:
        """Height and width in pixels of the pictures; `default` in place of what is null."""
        return self.height or default, self.width or default


def settled(sampling: Sampling, model: Model) -> Sampling:
    """The settings with the checkpoint's own steps and guidance in place of what is null."""
    from infer.checkpoint.family import own_drawing

    own = own_drawing(model)
    return replace(
        sampling,
        steps=own.steps if sampling.steps is None else sampling.steps,
        guidance=own.guidance if sampling.guidance is None else sampling.guidance,
    )


def noise(seed: int, height: int, width: int, channels: int) -> Tensor:
    """Packed noise [1, tokens, channels * 4] of a picture of height x width pixels, drawn in fp32 on the CPU."""
    import torch

    from infer.family.packing import FACTOR, pack

    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn((1, channels, height // FACTOR, width // FACTOR), generator=generator))


def draw(
    transformer: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    text: Text,
    seed: int,
    sampling: Sampling,
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """One picture's packed latents [1, tokens, channels * 4]. sampling: settled; size: height and width in pixels.

    Raises:
        NotFiniteError: the transformer's output is NaN or infinite, of which a picture shows nothing.
    """
    import torch

    from infer.fast.cuda_graph import Sampler
    from infer.quantize.compute import compute_dtype_of
    from infer.sample.encode import NotFiniteError

    if isinstance(transformer.forward, Sampler):
        transformer.forward.refresh()
    start = noise(seed, *size, transformer.config.in_channels // 4).to(device, compute_dtype_of(transformer))
    with torch.no_grad():
        latents = denoise(transformer, scheduler, text, start, sampling, size)
    if not latents.isfinite().all():
        share = 1 - float(latents.isfinite().float().mean())
        raise NotFiniteError(
            f"the picture of seed {seed} is not finite ({100 * share:.0f} % of its latents); {mend_of(transformer)}"
        )
    return latents


def denoise(
    transformer: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    text: Text,
    latents: Tensor,
    sampling: Sampling,
    size: tuple[int, int],
) -> Tensor:
    """Packed noise -> packed latents, as the families' pipelines in diffusers do it, bit for bit. Those differ in what
    the transformer is given and in whether guidance takes two calls. (Flux2KleinPipeline gives no latents without an
    autoencoder.) The text's references stand behind the latents at every step, as they are."""
    import numpy as np
    import torch

    from infer.family.find import of_model
    from infer.family.packing import FACTOR
    from infer.fast.precomputed import steps_of, velocity_of

    steps, guidance = sampling.steps, sampling.guidance
    assert steps is not None and guidance is not None, "the settings are not settled"
    family, dtype, tokens = of_model(transformer), latents.dtype, latents.shape[1]
    texts = [text] if text.empty is None or guidance <= 1 else [text, text.empty]
    references = [each[None].to(latents.device, dtype) for each in text.references]
    calls = [
        family.inputs(
            transformer.config,
            latents,
            size[0] // FACTOR,
            size[1] // FACTOR,
            one.embeds[None].to(latents.device, dtype),
            None if one.pooled is None else one.pooled[None].to(latents.device, dtype),
            guidance,
            dtype,
            references,
        )
        for one in texts
    ]
    own_sigmas = getattr(scheduler.config, "use_flow_sigmas", False)
    levels = {"num_inference_steps": steps} if own_sigmas else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    scheduler.set_timesteps(**levels, device=latents.device, mu=family.mu(scheduler.config, tokens, steps))
    scheduler.set_begin_index(0)  # without it the scheduler waits for the device at every step
    behind = calls[0]["hidden_states"][:, tokens:]
    of_call = [steps_of(transformer, call, scheduler.timesteps.to(dtype) / 1000) for call in calls]
    for t, *given in zip(scheduler.timesteps, *of_call, strict=True):
        seen = torch.cat([latents, behind], dim=1) if references else latents
        found = [velocity_of(transformer, one | {"hidden_states": seen})[:, :tokens] for one in given]
        velocity = found[0] if len(found) == 1 else found[1] + guidance * (found[0] - found[1])
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def mend_of(transformer: Any) -> str:
    """What to do about a transformer whose output is not finite."""
    import torch

    from infer.quantize.compute import product_dtype_of

    mends = ["the checkpoint may be damaged"]
    if getattr(transformer, "peft_config", {}):
        mends.insert(0, "the adapter may be ruined or its weight too high")
    if product_dtype_of(transformer) == torch.float16:
        mends.insert(0, "fp16 may not hold its activations: set compute_dtype=bf16 or fp32 in its precision")
    return "; ".join(mends)
