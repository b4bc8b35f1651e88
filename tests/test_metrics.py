import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from d4d_jax.metrics import alpha_iou, psnr, ssim

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def image_pair(kind: str, shape=(37, 41, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.random(shape)
    noise = 0.05 * rng.standard_normal(shape)
    if kind == "object on white":
        image[:10], image[25:] = 1, 1
        noise[:10], noise[25:] = 0, 0
    elif kind == "almost white":
        image, noise = 0.97 + 0.02 * image, 0.01 * noise
    return image.astype(np.float32), np.clip(image + noise, 0, 1).astype(np.float32)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["noise", "object on white", "almost white"])
def test_scores_agree_with_scikit_image(kind):
    first, second = image_pair(kind)
    exact = first.astype(float), second.astype(float)
    wanted = structural_similarity(*exact, data_range=1, channel_axis=-1, **GAUSSIAN)
    np.testing.assert_allclose(ssim(first, second), wanted, atol=1e-6)
    wanted = structural_similarity(*exact, data_range=1, channel_axis=-1)
    np.testing.assert_allclose(ssim(first, second, window="uniform"), wanted, atol=1e-6)
    wanted = peak_signal_noise_ratio(*exact, data_range=1)
    np.testing.assert_allclose(psnr(first, second), wanted, atol=1e-4)


def test_data_range_rescales_the_images():
    first, second = image_pair("noise")
    np.testing.assert_allclose(
        ssim(255 * first, 255 * second, data_range=255.0), ssim(first, second), rtol=1e-5
    )
    np.testing.assert_allclose(
        psnr(255 * first, 255 * second, data_range=255.0), psnr(first, second), rtol=1e-5
    )


def test_leading_axes_are_kept_under_jit():
    first, second = image_pair("noise", (2, 3, 16, 18, 1))
    for score in (psnr, ssim):
        together = jax.jit(score)(first, second)
        assert together.shape == (2, 3)
        np.testing.assert_allclose(together[1, 2], score(first[1, 2], second[1, 2]), rtol=1e-5)


def test_equal_images():
    image, _ = image_pair("noise")
    assert np.isinf(psnr(image, image))
    np.testing.assert_allclose(ssim(image, image), 1, atol=1e-6)


def test_psnr_of_a_known_error():
    np.testing.assert_allclose(
        psnr(np.full((4, 4, 3), 0.6), np.full((4, 4, 3), 0.5)), 20, rtol=1e-5
    )


def test_ssim_can_be_optimised():
    wanted = jnp.asarray(image_pair("noise", (16, 16, 1))[0])
    gradient = jax.jit(jax.grad(lambda image: ssim(image, wanted)))
    at_optimum = gradient(wanted)
    np.testing.assert_allclose(at_optimum, 0, atol=1e-5)
    blurred = 0.5 * wanted + 0.25
    step = gradient(blurred)
    assert np.isfinite(step).all()
    assert ssim(blurred + 0.1 * step / jnp.abs(step).max(), wanted) > ssim(blurred, wanted)


def test_ssim_refuses_what_it_cannot_measure():
    image = np.zeros((10, 20, 3), np.float32)
    with pytest.raises(ValueError, match="at least 11 pixels a side; got 10 x 20"):
        ssim(image, image)
    assert ssim(image, image, window="uniform") == 1


def test_alpha_iou():
    first = np.zeros((3, 4, 4), np.float32)
    second = np.zeros((3, 4, 4), np.float32)
    first[0, :2], second[0, 1:3] = 1, 0.6
    first[1, 0], second[1, 0] = 0.9, 0.4
    np.testing.assert_allclose(alpha_iou(first, second), [1 / 3, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(alpha_iou(first, second, threshold=0.3), [1 / 3, 1, 1], rtol=1e-6)
