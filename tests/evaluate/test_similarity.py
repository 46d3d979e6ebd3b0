"""PSNR and SSIM against their equations, seams against seams put in by hand."""

import math

import numpy as np
import pytest

from neounify.errors import ImageError
from neounify.scenes.bench import psnr, seam_ratio, ssim
from neounify.scenes.world import PRESETS, render, sample_rng, sample_scene

Pixels = np.ndarray


def flat(value: int, side: int = 32) -> Pixels:
    return np.full((side, side, 3), value, np.uint8)


def scene(index: int) -> Pixels:
    return render(sample_scene(sample_rng(4, index), PRESETS["wide"]), PRESETS["wide"])


def noisy(image: Pixels, sigma: float) -> Pixels:
    rng = np.random.default_rng(0)
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def test_psnr_of_a_constant_difference() -> None:
    assert psnr(flat(100), flat(110)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(flat(0), flat(255)) == pytest.approx(0)
    assert psnr(flat(7), flat(7)) == 100.0


def test_psnr_looks_at_the_mask_alone() -> None:
    other = flat(100)
    other[:16] = 0
    mask = np.zeros((32, 32), bool)
    mask[16:] = True
    assert psnr(flat(100), other, mask) == 100.0
    assert psnr(flat(100), other) < 15
    with pytest.raises(ImageError, match="no pixel"):
        psnr(flat(1), flat(1), np.zeros((32, 32), bool))


def test_ssim_of_constant_images_is_the_mean_term() -> None:
    a, b, c1 = 100.0, 140.0, (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(flat(100), flat(140)) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_the_equation_at_one_window() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (11, 11, 3), dtype=np.uint8) for _ in range(2))
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_is_one_for_equals_symmetric_and_falls_with_noise() -> None:
    image = scene(0)
    assert ssim(image, image) == pytest.approx(1)
    little, much = noisy(image, 5), noisy(image, 40)
    assert ssim(image, little) == pytest.approx(ssim(little, image))
    assert 1 > ssim(image, little) > ssim(image, much) > 0


def test_images_of_two_sizes_cannot_be_compared() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ImageError, match="one size"):
            measure(flat(0), flat(0, 16))
    with pytest.raises(ImageError, match="11×11"):
        ssim(flat(0, 8), flat(0, 8))


def test_true_renders_and_even_noise_have_no_seams() -> None:
    ratios = [seam_ratio(scene(index)) for index in range(60)]
    assert ratios == pytest.approx([1.0] * 60, abs=0.05)
    assert seam_ratio(noisy(flat(128, 64), 8)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("token", [8, 16, 32])
def test_steps_at_token_borders_are_seen_and_grow(token: int) -> None:
    rng = np.random.default_rng(2)
    ratios = []
    for strength in (2, 6, 30):
        grid = rng.normal(0, strength, (64 // token, 64 // token, 1))
        seams = np.kron(grid, np.ones((token, token, 1)))
        image = np.clip(scene(1) * 0.8 + 20 + seams, 0, 255).astype(np.uint8)
        ratios.append(seam_ratio(image, token))
    assert 1.3 < ratios[0] < ratios[1] < ratios[2]


def test_steps_elsewhere_are_no_seams() -> None:
    grid = np.random.default_rng(3).normal(0, 10, (64 // 16 + 1, 64 // 16 + 1, 1))
    shifted = np.kron(grid, np.ones((16, 16, 1)))[8:72, 8:72]
    assert seam_ratio(np.clip(128 + shifted, 0, 255).astype(np.uint8)) <= 1


def test_tokens_of_a_few_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="token"):
        seam_ratio(flat(0), 2)
