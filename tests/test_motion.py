"""Motion magnitude: Eq. 1 in pixels and in latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.motion import latent_motion_magnitude, motion_magnitude


def clips(seed, *batch):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (2, *batch, 5, 4, 6, 3)).astype(np.float32)


def test_a_clip_that_stands_still_has_no_motion():
    clip = clips(0)[0]
    assert motion_magnitude(clip, clip) == 0.0


def test_one_number_for_every_clip():
    dynamic, static = clips(1, 2, 3)
    magnitudes = motion_magnitude(dynamic, static)
    assert magnitudes.shape == (2, 3)
    expected = 100 * np.mean((dynamic - static) ** 2, (-4, -3, -2, -1))
    np.testing.assert_allclose(magnitudes, expected, rtol=1e-5)


def test_sum_is_the_norm_as_printed_averaged_over_frames():
    dynamic, static = clips(2)
    norms = [np.sum((a - b) ** 2) for a, b in zip(dynamic, static, strict=True)]
    magnitude = motion_magnitude(dynamic, static, scale=1.0, reduction="sum")
    np.testing.assert_allclose(magnitude, np.mean(norms), rtol=1e-5)


def test_opposite_images_are_at_the_top_of_the_scale():
    black, white = -np.ones((1, 2, 2, 3), np.float32), np.ones((1, 2, 2, 3), np.float32)
    np.testing.assert_allclose(motion_magnitude(black, white), 400.0)


def test_latent_form_is_unscaled_and_differentiable():
    dynamic, static = map(jnp.asarray, clips(3, 2))
    value, gradient = jax.value_and_grad(lambda x: latent_motion_magnitude(x, static).sum())(
        dynamic
    )
    np.testing.assert_allclose(100 * value, motion_magnitude(dynamic, static).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * (dynamic - static) / dynamic[0].size, atol=1e-6)


def test_mismatched_clips_and_unknown_reductions_are_refused():
    dynamic, static = clips(4)
    with pytest.raises(ValueError, match="must have the same shape"):
        motion_magnitude(dynamic, static[:4])
    with pytest.raises(ValueError, match="not 'median'"):
        motion_magnitude(dynamic, static, reduction="median")


def test_numpy_clips_are_compared_without_jax():
    dynamic, static = clips(5, 2)
    magnitudes = motion_magnitude(dynamic, static)
    assert isinstance(magnitudes, np.ndarray) and magnitudes.shape == (2,)
    assert isinstance(motion_magnitude(dynamic[0], static[0]), np.ndarray)
    traced = motion_magnitude(jnp.asarray(dynamic), static)
    assert isinstance(traced, jax.Array)
    np.testing.assert_allclose(magnitudes, traced, rtol=1e-5)
