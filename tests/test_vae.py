"""Latent codecs: exact inverses, variances, and sizes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax import registry
from d4d_jax.models.vae import PatchPCA, fit_patch_pca
from d4d_jax.typing import Codec


def images(count=6, height=16, width=24, channels=4):
    """Smooth random images in [-1, 1]."""
    noise = np.random.default_rng(0).normal(size=(count, height, width, channels))
    return np.clip(noise.cumsum(1).cumsum(2) * 0.05, -1, 1).astype(np.float32)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_all_components_give_back_the_image(whitening):
    frames = images()
    params = fit_patch_pca(frames, 4, 64, whitening=whitening)
    latents = PatchPCA(4).encode(params, frames)
    assert latents.shape == (6, 4, 6, 64)
    np.testing.assert_allclose(PatchPCA(4).decode(params, latents), frames, atol=1e-4)


def test_few_components_keep_most_of_a_smooth_image_and_encode_inverts_decode():
    frames, codec = images(), PatchPCA(4, 8)
    params = codec.fit(frames)
    latents = codec.encode(params, frames)
    decoded = codec.decode(params, latents)
    assert np.mean((decoded - frames) ** 2) < 0.1 * np.var(frames)
    np.testing.assert_allclose(codec.encode(params, decoded), latents, atol=1e-4)


def test_whitening_evens_out_the_variances():
    frames = images()

    def deviations(whitening):
        params = fit_patch_pca(frames, 4, 6, whitening=whitening)
        return np.asarray(PatchPCA(4).encode(params, frames)).std((0, 1, 2))

    np.testing.assert_allclose(deviations(1.0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(np.mean(deviations(0.0) ** 2), 1.0, rtol=1e-3)
    spreads = [np.ptp(np.log(deviations(whitening))) for whitening in (0.0, 0.5, 1.0)]
    assert spreads[0] > 1.9 * spreads[1] > 1.9 * spreads[2]


def test_latent_cells_hold_their_own_patch():
    frames = images(1, 8, 8)
    params = fit_patch_pca(images(), 4, 8)
    changed = frames.copy()
    changed[0, 4:, :4] = 0.5
    moved = PatchPCA(4).encode(params, changed) - PatchPCA(4).encode(params, frames)
    assert (np.abs(moved).max(-1) > 1e-3).tolist() == [[[False, False], [True, False]]]


def test_any_leading_axes_pass_under_jit_and_fits_repeat_exactly():
    frames, codec = images(), PatchPCA(8)
    params = fit_patch_pca(frames, 8, 5)
    clip = jnp.asarray(frames).reshape(2, 3, 16, 24, 4)
    latents = jax.jit(codec.encode)(params, clip)
    assert latents.shape == (2, 3, 2, 3, 5)
    again = fit_patch_pca(frames, 8, 5)
    assert all((params[name] == again[name]).all() for name in params)


def test_codecs_are_built_by_name_and_pixel_space_is_the_identity():
    codec = registry.build("codec", {"name": "patch_pca", "factor": 8, "dim": 48})
    assert isinstance(codec, Codec) and codec.dim == 48
    pixels = registry.build("codec", {"name": "identity"})
    np.testing.assert_array_equal(pixels.decode({}, pixels.encode({}, images())), images())


def test_sizes_that_do_not_fit_are_named():
    frames = images()
    params = fit_patch_pca(frames, 4, 8)
    with pytest.raises(ValueError, match="16 x 24 do not split into patches of 5 x 5"):
        fit_patch_pca(frames, 5, 8)
    with pytest.raises(ValueError, match="fitted to 4 channels; the images have 3"):
        PatchPCA(4).encode(params, frames[..., :3])
    with pytest.raises(ValueError, match=r"between 1 and 64 .* not 65"):
        fit_patch_pca(frames, 4, 65)
