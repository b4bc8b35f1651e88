"""Losses: the minimum, the motion term and its weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.losses import (
    denoising_loss,
    min_snr_weight,
    motion_reconstruction_loss,
)
from d4d_jax.schedules import PREDICTIONS, cosine, scaled_linear

TIMES = jnp.array([100, 600])


def batch():
    return jax.random.normal(jax.random.key(0), (3, 2, 4, 2, 2, 3))  # clean, noise, static


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_answer_costs_nothing(prediction):
    schedule = cosine(prediction=prediction)
    x0, noise, static = batch()
    answer = schedule.target(x0, noise, TIMES)
    clips = (answer, x0, noise, TIMES)
    np.testing.assert_array_equal(denoising_loss(schedule, *clips), 0.0)
    motion = motion_reconstruction_loss(schedule, *clips, static)
    np.testing.assert_allclose(motion, 0.0, atol=1e-8)


def test_denoising_loss_is_the_mean_square_of_every_sample():
    schedule = cosine(prediction="v")
    x0, noise, _ = batch()
    answer = schedule.target(x0, noise, TIMES)
    off = answer + jnp.array([0.5, -2.0]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(
        denoising_loss(schedule, off, x0, noise, TIMES), [0.25, 4.0], rtol=1e-5
    )


def test_motion_loss_sees_the_motion_that_the_prediction_implies():
    """A clip predicted to stand still misses exactly the true magnitude."""
    schedule = cosine(prediction="x0")
    x0, noise, static = batch()
    still = motion_reconstruction_loss(schedule, static, x0, noise, TIMES, static)
    magnitude = jnp.square(x0 - static).mean((1, 2, 3, 4))
    np.testing.assert_allclose(still, magnitude**2, rtol=1e-5)


def test_snr_weight_tames_the_noisy_end_under_eps():
    schedule, times = scaled_linear(), jnp.array([50, 981])
    x0, noise, static = batch()
    off = noise + 0.3 * static
    options = (schedule, off, x0, noise, times, static)
    plain = motion_reconstruction_loss(*options)
    even = motion_reconstruction_loss(*options, snr_power=2.0)
    np.testing.assert_allclose(even[0], plain[0])  # more signal than noise: weight 1
    np.testing.assert_allclose(even[1], plain[1] * schedule.snr(times)[1] ** 2, rtol=1e-5)
    assert plain[1] > 1e3 * even[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_are_finite_where_no_signal_is_left(prediction):
    schedule = cosine(prediction=prediction)
    x0, noise, static = batch()
    times = jnp.array([0, 999])

    def loss(answer):
        clips = (schedule, answer, x0, noise, times)
        motion = motion_reconstruction_loss(*clips, static, snr_power=1.0)
        return (denoising_loss(*clips) + motion).mean()

    assert jnp.isfinite(jax.grad(loss)(x0)).all()


@pytest.mark.parametrize("gamma", [0.5, 5])
def test_min_snr_weighs_the_implied_clip_alike_in_every_parametrisation(gamma):
    """One wrong clip, told as x0, noise or velocity, costs min(snr, gamma) times its error."""
    x0, noise, _ = batch()
    wrong = x0 + 0.3 * noise[::-1]
    error = jnp.square(wrong - x0).mean((1, 2, 3, 4))
    for prediction in PREDICTIONS:
        schedule = cosine(prediction=prediction)
        x_t = schedule.add_noise(x0, noise, TIMES)
        signal, sigma = schedule.scales(TIMES, x0.ndim)
        implied_noise = (x_t - signal * wrong) / sigma
        answer = schedule.target(wrong, implied_noise, TIMES)
        loss = denoising_loss(schedule, answer, x0, noise, TIMES, min_snr_gamma=gamma)
        expected = jnp.minimum(schedule.snr(TIMES), gamma) * error
        np.testing.assert_allclose(loss, expected, rtol=2e-4)


def test_min_snr_is_finite_where_no_signal_is_left_and_wants_a_positive_gamma():
    for prediction in PREDICTIONS:
        schedule = cosine(prediction=prediction, zero_terminal_snr=True)
        ends = jnp.array([0, schedule.num_steps - 1])
        weight = min_snr_weight(schedule, ends, 5)
        assert np.isfinite(weight).all() and (np.asarray(weight) >= 0).all()
        with pytest.raises(ValueError, match="min_snr_gamma must be positive, but it is 0"):
            min_snr_weight(schedule, ends, 0)
    assert min_snr_weight(cosine(prediction="eps", zero_terminal_snr=True), ends, 5)[1] == 1
