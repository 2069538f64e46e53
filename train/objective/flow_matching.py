"""The flow-matching objective of FLUX (Lipman et al. 2023, Esser et al. 2024) as pure functions.

x_sigma = (1 - sigma) x_0 + sigma noise, and the transformer predicts the velocity noise - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infer.program.bounds import check_most
from infer.program.no_effect import refuse_idle

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DENSITIES = ("uniform", "logit_normal", "shifted")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass
class Flow:
    """Which noise levels are trained on, and how much each counts."""

    density: str = "logit_normal"
    """uniform; logit_normal (Esser et al. 2024); shifted: logit-normal, then FLUX's shift for the picture's size,
    which is where the sampler spends its steps."""
    logit_mean: float = 0.0
    """Of the logit of sigma, the share of noise: above 0 trains noisier pictures. diffusers' scripts count the other
    way round (their --logit_mean=1 is -1 here), because they take the drawn number as a place in a list of timesteps
    that begins with the noisiest."""
    logit_std: float = 1.0
    """Spread of the logit of sigma: below 1 trains more on middling noise."""
    weighting: str = "none"
    """none, sigma_sqrt (1 / sigma^2) or cosmap (Esser et al. 2024)."""
    guidance: float = 1.0
    """The guidance embedding during training, of models that have one; 1.0 is right for FLUX.1-dev and its kin."""

    def __post_init__(self) -> None:
        check_most(self, "flow.", logit_mean=100, logit_std=100, guidance=10**4)
        if self.density not in DENSITIES:
            raise ValueError(f"flow.density is {self.density!r}; choose one of {', '.join(DENSITIES)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"flow.weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if not self.logit_std > 0:
            raise ValueError(f"flow.logit_std is {self.logit_std}; it must be above 0")
        if self.density == "uniform":
            refuse_idle(self, "flow.", ("logit_mean", "logit_std"), "flow.density=uniform draws no logit-normal")


def shift_for(tokens: int) -> float:
    """FLUX's shift of sigma for a picture of so many packed tokens: exp(mu), mu linear from 0.5 at 256 tokens to 1.15
    at 4096 (black-forest-labs/flux sampling.py; the values of FLUX.1-dev's scheduler)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def sample_sigma(flow: Flow, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Noise levels [batch] in (0, 1)."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheme = "none" if flow.density == "uniform" else "logit_normal"
    u: Tensor = compute_density_for_timestep_sampling(
        scheme, batch, flow.logit_mean, flow.logit_std, device="cpu", generator=generator
    )
    sigma = shifted(u, tokens) if flow.density == "shifted" else u
    return sigma.clamp(1e-4, 1 - 1e-4)  # both ends are degenerate: nothing to predict, or nothing to see


def shifted(u: Tensor, tokens: int) -> Tensor:
    shift = shift_for(tokens)
    return shift * u / (1 + (shift - 1) * u)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma for x0 and noise [batch, ...] and sigma [batch]."""
    level = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - level) * x0 + level * noise


def predict(
    transformer: Any,
    x: Tensor,
    embeds: Tensor,
    pooled: Tensor | None,
    sigma: Tensor,
    guidance: float,
    dtype: torch.dtype,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Velocity [batch, tokens, channels * 4] in fp32 for latents x [batch, channels, height, width].

    embeds [batch, text tokens, width], pooled [batch, width], sigma [batch]; dtype is the transformer's own;
    references: latents [batch, channels, height, width] without noise, of which no velocity is given.
    """
    from infer.family.find import of_model
    from infer.family.packing import pack

    config = getattr(transformer, "module", transformer).config  # DistributedDataParallel wraps it
    height, width = x.shape[-2:]
    given = of_model(transformer).inputs(config, pack(x), height, width, embeds, pooled, guidance, dtype, references)
    velocity: Tensor = transformer(**given, timestep=sigma, return_dict=False)[0]
    return (velocity[:, : height * width // 4] if references else velocity).float()


def losses(
    velocity: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, weighting: str, mask: Tensor | None = None
) -> Tensor:
    """The weighted squared error of each sample, [batch]. velocity is packed, x0 and noise are not.

    mask: how much the error at each latent counts, from 0 to 1, [batch, 1, height, width]; None: all count fully. The
    mean is over all latents, so a sample counts less if its mask leaves less of it.
    """
    from infer.family.packing import pack

    counts = None if mask is None else pack(mask.expand_as(x0))
    return distances(velocity, pack(noise - x0), sigma, weighting, counts)


def distances(velocity: Tensor, target: Tensor, sigma: Tensor, weighting: str, mask: Tensor | None = None) -> Tensor:
    """The weighted squared error of each sample, [batch]; velocity, target and mask are packed."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    error = (velocity - target).square()
    if mask is not None:
        error = error * mask
    weight = compute_loss_weighting_for_sd3(weighting, sigma)
    weighted: Tensor = error.flatten(1).mean(1) * weight
    return weighted
