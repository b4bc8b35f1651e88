"""DPM-Solver++(2M): its order on a mixture of Gaussians, its first and last moves, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4d_jax.sampling import DDIM, DPMSolver2M, Level, sample
from d4d_jax.schedules import (
    PREDICTIONS,
    NoiseSchedule,
    cosine,
    leading,
    linspace,
    scaled_linear,
    trailing,
)

MEANS, SHARES, DEVIATION = np.array([-2.0, 0.5, 1.5]), np.array([0.3, 0.5, 0.2]), 0.4


def mixture(schedule):
    """The exact network for data from a mixture of Gaussians, in the schedule's prediction."""

    def denoise(x_t, timestep, conditioning):
        signal, sigma = schedule.scales(timestep, x_t.ndim)
        spread = (signal * DEVIATION) ** 2 + sigma**2
        away = x_t[..., None] - signal[..., None] * MEANS
        logits = jnp.log(SHARES) - away**2 / (2 * spread[..., None])
        guesses = MEANS + (signal * DEVIATION**2 / spread)[..., None] * away
        x0 = jnp.sum(jax.nn.softmax(logits, axis=-1) * guesses, axis=-1)
        eps = (x_t - signal * x0) / sigma
        return {"x0": x0, "eps": eps, "v": signal * eps - sigma * x0}[schedule.prediction]

    return denoise


def noise_of(n):
    return jax.random.normal(jax.random.key(0), (n, 1))


def errors(schedule, counts, fine, timesteps, final):
    """RMS distance of DDIM and of 2M from a fine solution, for each number of steps."""
    denoise, noise = mixture(schedule), noise_of(256)

    def run(stepper, count):
        return sample(
            denoise, schedule, stepper, noise, None, timesteps=timesteps(count), final=final
        )

    exact = run(DPMSolver2M(), fine)
    return [
        np.array([jnp.sqrt(jnp.mean((run(stepper, count) - exact) ** 2)) for count in counts])
        for stepper in (DDIM(), DPMSolver2M())
    ]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_is_of_second_order_in_the_log_snr(prediction):
    """Half the step, a quarter of the error; DDIM: half of it."""
    dense = cosine(100_000, zero_terminal_snr=False)
    log_snr = np.log(np.asarray(dense.signal, float) / np.asarray(dense.sigma, float))
    first, last = np.searchsorted(-log_snr, [-4.0, 4.0])
    table = np.asarray(dense.alphas_cumprod, float)[first : last + 1]
    schedule = NoiseSchedule.from_alphas_cumprod(table, prediction)

    def even(count):
        wanted = np.linspace(-4.0, 4.0, count + 1)[:-1]
        return np.minimum(np.searchsorted(-log_snr, -wanted) - first, table.size - 1)

    ddim, second = errors(schedule, (20, 40, 80), 640, even, "first")
    np.testing.assert_allclose(np.log2(ddim[:-1] / ddim[1:]), 1.0, atol=0.15)
    np.testing.assert_allclose(np.log2(second[:-1] / second[1:]), 2.0, atol=0.15)
    assert np.all(second < 0.3 * ddim)


@pytest.mark.parametrize("schedule", [cosine(), scaled_linear(prediction="v")], ids=["I2V", "T2V"])
def test_needs_fewer_steps_than_ddim_on_the_published_schedules(schedule):
    """From pure noise (I2V) as well as from the little signal that T2V leaves."""
    ddim, second = errors(schedule, (20, 40), 999, lambda n: trailing(1000, n), "one")
    assert second[0] < 0.65 * ddim[0] and np.all(second < ddim)
    assert second[0] < 1.2 * ddim[1]


@pytest.mark.parametrize("final", ["first", "one"])
@pytest.mark.parametrize("spacing", [leading, trailing, linspace])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_is_finite_with_every_prediction_and_spacing(prediction, spacing, final):
    schedule = cosine(prediction=prediction)
    run = {"timesteps": spacing(1000, 8), "final": final}

    def loss(gain):
        denoise = lambda x, t, c: gain * jnp.tanh(x)  # noqa: E731
        return jnp.sum(sample(denoise, schedule, DPMSolver2M(), noise_of(4), None, **run))

    value, gradient = jax.value_and_grad(loss)(0.5)
    assert jnp.isfinite(value) and jnp.isfinite(gradient) and gradient != 0.0


@pytest.mark.parametrize("stepper", [DPMSolver2M(), DPMSolver2M(lower_order_final=False)])
def test_two_moves_to_the_clean_sample_are_those_of_ddim(stepper):
    """The first move knows no change of x0, the last is plain: to the clean sample it must be."""
    schedule, noise = scaled_linear(), noise_of(32)
    run = {"timesteps": np.array([800, 300]), "final": "one"}
    denoise = mixture(schedule)
    second, plain = (
        sample(denoise, schedule, each, noise, None, **run) for each in (stepper, DDIM())
    )
    np.testing.assert_allclose(second, plain, atol=1e-5)


def test_the_last_move_is_plain_only_if_asked():
    schedule, noise = scaled_linear(), noise_of(32)
    ddim, lower, full = (
        sample(mixture(schedule), schedule, each, noise, None, timesteps=np.array([800, 300]))
        for each in (DDIM(), DPMSolver2M(), DPMSolver2M(lower_order_final=False))
    )
    np.testing.assert_allclose(lower, ddim, atol=1e-6)
    assert jnp.abs(full - ddim).max() > 0.05


@given(before=st.floats(-4.0, 0.0), width=st.floats(0.1, 2.0), slope=st.floats(-2.0, 2.0))
@settings(max_examples=30, deadline=None)
def test_a_move_is_the_midpoint_rule_in_the_log_snr(before, width, slope):
    """With x0 linear in the log-SNR a move has x0 of its middle, whatever its width."""

    def level(log_snr):
        abar = jax.nn.sigmoid(2.0 * jnp.float32(log_snr))
        return Level(jnp.sqrt(abar), jnp.sqrt(1.0 - abar))

    def x0_at(log_snr):
        return jnp.full((3,), 1.0 + slope * log_snr)

    points = before, before + 0.7, before + 0.7 + width
    _, now, following = map(level, points)
    x_t = jnp.array([-0.5, 0.0, 2.0])
    eps = (x_t - now.signal * x0_at(points[1])) / now.sigma
    carry = x0_at(points[0]), jnp.float32(points[0])
    x, (kept, _) = DPMSolver2M().step(x_t, x0_at(points[1]), eps, now, following, None, carry)
    middle = x0_at((points[1] + points[2]) / 2)
    shrink = following.sigma / now.sigma
    expected = shrink * x_t + (following.signal - shrink * now.signal) * middle
    np.testing.assert_allclose(x, expected, atol=2e-4)
    np.testing.assert_array_equal(kept, x0_at(points[1]))


def test_levels_that_repeat_in_the_table_do_no_harm():
    schedule = NoiseSchedule.from_alphas_cumprod([1.0, 1.0, 0.5, 0.5, 0.2], "x0")
    denoise = lambda x, t, c: jnp.tanh(x) + 0.1 * t[:, None]  # noqa: E731
    run = {"timesteps": np.arange(5)[::-1]}
    result = sample(denoise, schedule, DPMSolver2M(), noise_of(4), None, **run)
    assert jnp.isfinite(result).all()


def test_a_network_in_bfloat16_leaves_the_sampler_in_float32():
    schedule = cosine(prediction="x0")
    half = lambda x, t, c: jnp.tanh(x).astype(jnp.bfloat16)  # noqa: E731
    run = {"timesteps": trailing(1000, 4)}
    for stepper in (DDIM(), DPMSolver2M()):
        assert sample(half, schedule, stepper, noise_of(4), None, **run).dtype == jnp.float32
