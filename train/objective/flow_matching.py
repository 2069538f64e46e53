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

DENSITIES = ("uniform", "logit_normal", "mode", "shifted")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap", "bell", "min_snr")
LOSSES = ("mse", "huber", "smooth_l1", "mae")
SCHEDULES = ("constant", "snr", "exponential")
MODE_SCALE = 1.29  # of the density `mode`, as Stable Diffusion 3 was trained


@dataclass
class Flow:
    """Which noise levels are trained on, and how much each counts."""

    density: str = "logit_normal"
    """uniform; logit_normal and mode (Esser et al. 2024; mode has heavy tails, of scale 1.29); shifted: logit-normal,
    then FLUX's shift for the picture's size, which is where the sampler spends its steps."""
    logit_mean: float = 0.0
    """Of the logit of sigma, the share of noise: above 0 trains noisier pictures. diffusers' scripts count the other
    way round (their --logit_mean=1 is -1 here), because they take the drawn number as a place in a list of timesteps
    that begins with the noisiest."""
    logit_std: float = 1.0
    """Spread of the logit of sigma: below 1 trains more on middling noise."""
    weighting: str = "none"
    """By noise level: none, sigma_sqrt (1 / sigma^2), cosmap (Esser et al. 2024), bell (middling noise counts most, as
    in ai-toolkit's `weighted`), or min_snr (Hang et al. 2023, for velocities: little noise counts most)."""
    min_snr_gamma: float = 5.0
    """Of min_snr: the signal-to-noise ratio from which less noise counts no more."""
    loss: str = "mse"
    """Of each number's error: mse (its square), huber (a square up to about loss_scale, then straight), smooth_l1
    (huber over loss_scale) or mae (its size)."""
    loss_scale: float = 0.1
    """Where huber and smooth_l1 go over from a square to a straight line (kohya's huber_c)."""
    loss_schedule: str = "constant"
    """loss_scale over noise levels: constant; snr and exponential fall from 1 without noise to loss_scale at full noise
    (kohya's huber_schedule)."""
    guidance: float = 1.0
    """The guidance embedding during training, of models that have one; 1.0 is right for FLUX.1-dev and its kin."""

    def __post_init__(self) -> None:
        check_most(self, "flow.", logit_mean=100, logit_std=100, guidance=10**4, min_snr_gamma=10**6, loss_scale=10**6)
        if self.density not in DENSITIES:
            raise ValueError(f"flow.density is {self.density!r}; choose one of {', '.join(DENSITIES)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"flow.weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        for name, kinds in (("loss", LOSSES), ("loss_schedule", SCHEDULES)):
            if getattr(self, name) not in kinds:
                raise ValueError(f"flow.{name} is {getattr(self, name)!r}; choose one of {', '.join(kinds)}")
        for name in ("min_snr_gamma", "loss_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"flow.{name} is {getattr(self, name)}; it must be above 0")
        if self.loss_schedule == "exponential" and self.loss_scale > 1:
            raise ValueError(f"flow.loss_scale is {self.loss_scale}; with loss_schedule=exponential it is 1 at most")
        if self.weighting != "min_snr":
            refuse_idle(self, "flow.", ("min_snr_gamma",), f"flow.weighting={self.weighting} has no gamma")
        if self.loss in ("mse", "mae"):
            refuse_idle(self, "flow.", ("loss_scale", "loss_schedule"), f"flow.loss={self.loss} has no scale")
        if not self.logit_std > 0:
            raise ValueError(f"flow.logit_std is {self.logit_std}; it must be above 0")
        if self.density in ("uniform", "mode"):
            reason = f"flow.density={self.density} draws no logit-normal"
            refuse_idle(self, "flow.", ("logit_mean", "logit_std"), reason)


def shift_for(tokens: int) -> float:
    """FLUX's shift of sigma for a picture of so many packed tokens: exp(mu), mu linear from 0.5 at 256 tokens to 1.15
    at 4096 (black-forest-labs/flux sampling.py; the values of FLUX.1-dev's scheduler)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def sample_sigma(flow: Flow, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Noise levels [batch] in (0, 1)."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheme = {"uniform": "none", "mode": "mode"}.get(flow.density, "logit_normal")
    u: Tensor = compute_density_for_timestep_sampling(
        scheme, batch, flow.logit_mean, flow.logit_std, MODE_SCALE, device="cpu", generator=generator
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
    velocity: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, flow: Flow, mask: Tensor | None = None
) -> Tensor:
    """The weighted error of each sample, [batch]. velocity is packed, x0 and noise are not.

    mask: how much the error at each latent counts, from 0 to 1, [batch, 1, height, width]; None: all count fully. The
    mean is over all latents, so a sample counts less if its mask leaves less of it.
    """
    from infer.family.packing import pack

    counts = None if mask is None else pack(mask.expand_as(x0))
    return distances(velocity, pack(noise - x0), sigma, flow, counts)


def distances(velocity: Tensor, target: Tensor, sigma: Tensor, flow: Flow, mask: Tensor | None = None) -> Tensor:
    """The weighted error of each sample, [batch]; velocity, target and mask are packed."""
    error = _errors(velocity - target, sigma.view(-1, 1, 1), flow)
    if mask is not None:
        error = error * mask
    return error.flatten(1).mean(1) * weight_at(sigma, flow)


def _errors(difference: Tensor, sigma: Tensor, flow: Flow) -> Tensor:
    """The error of each number; huber is the pseudo-Huber loss (Charbonnier et al. 1997), as kohya has it."""
    if flow.loss == "mse":
        return difference.square()
    if flow.loss == "mae":
        return difference.abs()
    c = scale_at(sigma, flow)
    over = (difference.square() + c**2).sqrt() - c
    return 2 * c * over if flow.loss == "huber" else 2 * over


def scale_at(sigma: Tensor, flow: Flow) -> Tensor:
    """loss_scale at noise levels. kohya's for DDPM is (1 - c) / (1 + s)^2 + c with s the noise over the signal, which
    is sigma / (1 - sigma) here."""
    import torch

    c = flow.loss_scale
    if flow.loss_schedule == "snr":
        return (1 - c) * (1 - sigma) ** 2 + c
    if flow.loss_schedule == "exponential":
        return c**sigma
    return torch.full_like(sigma, c)


def weight_at(sigma: Tensor, flow: Flow) -> Tensor:
    """What an error counts at noise levels.

    min_snr: the error of x_0 is sigma^2 times that of the velocity, and counts min(SNR, gamma), SNR being
    ((1 - sigma) / sigma)^2. bell: exp(-2 (sigma - 1/2)^2) above its value at both ends, of mean 1.
    """
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    if flow.weighting == "min_snr":
        import torch

        return torch.minimum((1 - sigma) ** 2, flow.min_snr_gamma * sigma**2)
    if flow.weighting == "bell":
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - math.exp(-0.5)
        return ((-2 * (sigma - 0.5) ** 2).exp() - math.exp(-0.5)) / mean
    weight: Tensor = compute_loss_weighting_for_sd3(flow.weighting, sigma)
    return weight
