"""Gaussian diffusion with learned variances: the loss of a step, and sampling.

Forward, with b_t rising linearly over 1000 steps, a_t = 1 - b_t and A_t their product:

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) e

The posterior q(x_{t-1} | x_t, x_0) is normal with the mean

    sqrt(A_{t-1}) b_t / (1 - A_t) x_0 + sqrt(a_t) (1 - A_{t-1}) / (1 - A_t) x_t

and the variance B_t = b_t (1 - A_{t-1}) / (1 - A_t). The network gives e and v in [-1, 1], and the
log variance is (v + 1) / 2 log b_t + (1 - v) / 2 log B_t. The loss is the squared error of e plus
a thousandth of the variational bound's term, whose mean is held fixed: it teaches the variance
alone (Nichol and Dhariwal, 2021). Sampling is diffusers' DDPM scheduler on respaced steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000  # of training
SAMPLING_STEPS = 100
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
_BOUND_WEIGHT = 1e-3
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


class Diffusion:
    """The schedule's constants, (1000,) float64 each, on the CPU."""

    def __init__(self) -> None:
        self.betas = torch.linspace(_FIRST_BETA, _LAST_BETA, STEPS, dtype=torch.float64)
        self.kept = torch.cumprod(1 - self.betas, dim=0)  # A_t
        before = torch.cat([self.kept.new_ones(1), self.kept[:-1]])  # A_{t-1}
        self.posterior_variance = self.betas * (1 - before) / (1 - self.kept)
        self.of_image = before.sqrt() * self.betas / (1 - self.kept)
        self.of_noisy = (1 - self.betas).sqrt() * (1 - before) / (1 - self.kept)
        # The first step's posterior has no variance: the second's takes its place.
        self.log_lower = torch.cat(
            [self.posterior_variance[1:2], self.posterior_variance[1:]]
        ).log()
        self.log_upper = self.betas.log()

    def noisy(self, images: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of images (B, C, H, W) in [-1, 1], noise of the same shape and steps (B,)."""
        kept = _at(self.kept, steps, images)
        return kept.sqrt() * images + (1 - kept).sqrt() * noise

    def loss(
        self, denoise: Denoiser, images: Tensor, representations: Tensor,
        steps: Tensor, noise: Tensor,
    ) -> Tensor:  # fmt: skip
        """The mean loss of one step of each image, 0-d.

        Args:
            denoise: (noisy, steps, representations) -> (B, 2 C, H, W), as `Decoder`.
            images: (B, C, H, W) in [-1, 1].
            representations: (B, width).
            steps: (B,) int64 in [0, 1000).
            noise: as the images, standard normal.
        """
        noisy = self.noisy(images, noise, steps)
        predicted, place = denoise(noisy, steps, representations).chunk(2, dim=1)
        squared = (predicted - noise).square().mean()
        bound = self._bound(images, noisy, predicted.detach(), place, steps).mean()
        return squared + _BOUND_WEIGHT * STEPS * bound

    def _bound(
        self, images: Tensor, noisy: Tensor, noise: Tensor, place: Tensor, steps: Tensor
    ) -> Tensor:
        """(B,) terms of the variational bound in bits a value: KL of the posteriors, and for the
        first step the negative log likelihood of the image's 256 levels."""
        kept = _at(self.kept, steps, images)
        guess = ((noisy - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        of_image, of_noisy = _at(self.of_image, steps, images), _at(self.of_noisy, steps, images)
        true_mean = of_image * images + of_noisy * noisy
        mean = of_image * guess + of_noisy * noisy
        lower, upper = _at(self.log_lower, steps, images), _at(self.log_upper, steps, images)
        log_variance = (place + 1) / 2 * upper + (1 - place) / 2 * lower
        divergence = 0.5 * (
            log_variance
            - lower
            + (lower - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
            - 1
        )
        likelihood = _level_log_likelihood(images, mean, 0.5 * log_variance)
        term = torch.where((steps == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return term.flatten(1).mean(dim=1) / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoiser,
        representations: Tensor,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        steps: int = SAMPLING_STEPS,
        after_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """One image of each representation (B, width), by `steps` of the 1000.

        Args:
            shape: (C, H, W).
            generator: of all noise, on the CPU: samples do not depend on the device.
            after_step: called after each.

        Returns:
            (B, C, H, W) uint8, on the CPU.

        Raises:
            ValueError: steps outside 1 to 1000.
        """
        from diffusers import DDPMScheduler

        if not 1 <= steps <= STEPS:
            raise ValueError(f"steps must be in 1 to {STEPS}, got {steps}")
        scheduler = DDPMScheduler(
            num_train_timesteps=STEPS, beta_start=_FIRST_BETA, beta_end=_LAST_BETA,
            beta_schedule="linear", variance_type="learned_range", clip_sample=True,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        device = representations.device
        images = torch.randn(len(representations), *shape, generator=generator).to(device)
        for step in scheduler.timesteps:
            several = torch.full((len(images),), int(step), dtype=torch.int64, device=device)
            predicted = denoise(images, several, representations)
            images = scheduler.step(predicted, step, images, generator=generator).prev_sample
            if after_step is not None:
                after_step()
        return ((images.cpu().clamp(-1, 1) + 1) * 127.5).round().byte()


def _at(values: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    """(1000,) -> (B, 1, 1, 1) at each image's step, in its dtype and on its device."""
    return values.to(like.device)[steps].to(like.dtype).view(-1, 1, 1, 1)


def _level_log_likelihood(images: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of each value's level of 256 in [-1, 1], the outer ones open to infinity."""
    half = 1 / 255
    centred, precision = images - mean, (-log_std).exp()
    above = torch.special.ndtr(precision * (centred + half))
    below = torch.special.ndtr(precision * (centred - half))
    above = torch.where(images > 1 - half, torch.ones_like(above), above)
    below = torch.where(images < half - 1, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()
