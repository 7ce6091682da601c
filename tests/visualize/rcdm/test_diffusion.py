"""The diffusion's constants and loss against their definitions, in float64 and by sampling."""

import math

import pytest
import torch

from ijepa.visualize.rcdm.diffusion import STEPS, Diffusion

SHAPE = (4, 3, 4, 4)


@pytest.fixture
def diffusion():
    return Diffusion()


def test_noising_step_by_step_gives_the_marginal(diffusion):
    """x_t of the closed form has the mean and variance of t steps of noising."""
    scale, variance = 1.0, 0.0
    for step in range(STEPS):
        beta = diffusion.betas[step].item()
        scale, variance = scale * math.sqrt(1 - beta), variance * (1 - beta) + beta
        if step in (0, 7, 400, 999):
            steps = torch.full((1,), step)
            one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
            assert diffusion.noisy(one, 0 * one, steps).item() == pytest.approx(scale)
            assert diffusion.noisy(0 * one, one, steps).item() ** 2 == pytest.approx(variance)
    assert scale < 0.01  # nothing of the image is left at the end


@pytest.mark.parametrize("step", [1, 50, 999])
def test_the_posterior_is_that_of_bayes(diffusion, step):
    """q(x_{t-1} | x_t, x_0): the product of two normal densities in x_{t-1}."""
    before, beta = diffusion.kept[step - 1], diffusion.betas[step]
    image, noisy = torch.randn(2, dtype=torch.float64)
    # precision and mean of N(x; sqrt(A') x_0, 1 - A') N(x_t; sqrt(a) x, b) over x
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * image / (1 - before) + (1 - beta).sqrt() * noisy / beta) / precision
    assert diffusion.posterior_variance[step].item() == pytest.approx((1 / precision).item())
    ours = diffusion.of_image[step] * image + diffusion.of_noisy[step] * noisy
    assert ours.item() == pytest.approx(mean.item())


def test_the_bound_is_the_divergence_of_the_posteriors(diffusion):
    steps = torch.tensor([1, 30, 500, 999])
    images = torch.rand(SHAPE, dtype=torch.float64) * 2 - 1
    noise, wrong = torch.randn(2, *SHAPE, dtype=torch.float64)
    place = torch.rand(SHAPE, dtype=torch.float64) * 2 - 1
    noisy = diffusion.noisy(images, noise, steps)
    ours = diffusion._bound(images, noisy, wrong, place, steps)
    for number, step in enumerate(steps.tolist()):
        kept = diffusion.kept[step]
        guess = (noisy[number] - (1 - kept).sqrt() * wrong[number]) / kept.sqrt()
        weights = diffusion.of_image[step], diffusion.of_noisy[step]
        means = [weights[0] * x + weights[1] * noisy[number]
                 for x in (images[number], guess.clamp(-1, 1))]  # fmt: skip
        true_log = diffusion.posterior_variance[step].log()
        share = (place[number] + 1) / 2
        log_variance = share * diffusion.betas[step].log() + (1 - share) * true_log
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(
            normal(means[0], (0.5 * true_log).exp().expand_as(means[0])),
            normal(means[1], (0.5 * log_variance).exp()),
        ).mean() / math.log(2)  # fmt: skip
        assert ours[number].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_first_step_is_the_likelihood_of_the_levels(diffusion):
    """The probabilities of all 256 levels of a value sum to one."""
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)
    noisy = torch.full_like(levels, 0.3)
    steps = torch.zeros(256, dtype=torch.int64)
    bits = diffusion._bound(levels, noisy, torch.zeros_like(levels), 0 * levels, steps)
    assert (2 ** -bits).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_bound_teaches_the_variance_and_never_the_mean(diffusion):
    images = torch.rand(SHAPE) * 2 - 1
    noise = torch.randn(SHAPE)
    steps = torch.tensor([0, 10, 100, 999])
    guess = torch.randn(SHAPE, requires_grad=True)
    place = torch.zeros(SHAPE, requires_grad=True)
    loss = diffusion.loss(lambda *_: torch.cat([guess, place], 1), images, torch.zeros(4, 2),
                          steps, noise)  # fmt: skip
    of_guess, of_place = torch.autograd.grad(loss, (guess, place))
    torch.testing.assert_close(of_guess, 2 * (guess - noise).detach() / guess.numel())
    assert of_place.abs().sum() > 0


def test_the_right_noise_has_the_least_loss(diffusion):
    images, noise = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    steps = torch.randint(0, STEPS, (4,))

    def loss(guess):
        both = torch.cat([guess, torch.full_like(guess, -1)], dim=1)
        return diffusion.loss(lambda *_: both, images, torch.zeros(4, 2), steps, noise).item()

    assert loss(noise) < loss(noise + 0.1) < loss(torch.zeros_like(noise))


def test_sampling_with_the_perfect_denoiser_finds_the_image(diffusion):
    pytest.importorskip("diffusers", reason="RCDM's samples need diffusers")
    images = torch.rand(2, 3, 8, 8) * 1.8 - 0.9

    def denoise(noisy, steps, representations):
        kept = diffusion.kept[steps].float().view(-1, 1, 1, 1)
        noise = (noisy - kept.sqrt() * images) / (1 - kept).sqrt()
        return torch.cat([noise, torch.full_like(noise, -1)], dim=1)

    calls = []
    found = diffusion.sample(
        denoise, torch.zeros(2, 4), (3, 8, 8), torch.Generator().manual_seed(0), steps=20,
        after_step=lambda: calls.append(1),
    )  # fmt: skip
    assert len(calls) == 20 and found.dtype == torch.uint8
    assert (found.float() / 127.5 - 1 - images).abs().max() < 0.02
    with pytest.raises(ValueError, match="steps must be in 1 to 1000, got 0"):
        diffusion.sample(denoise, torch.zeros(2, 4), (3, 8, 8), torch.Generator(), steps=0)
