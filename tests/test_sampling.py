"""Samplers: against diffusers, against a denoiser known in closed form, and with any network."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import make_diffusion_golden as golden

from d4d_jax import registry, sampling
from d4d_jax.sampling import DDIM, ddim, sample
from d4d_jax.schedules import NoiseSchedule, cosine, scaled_linear

MEAN, DEVIATION = 2.0, 0.5


def gaussian_denoiser(schedule):
    """The exact network for data from a Gaussian: the posterior mean, as a velocity."""

    def denoise(x_t, timestep, conditioning):
        signal, sigma = schedule.scales(timestep, x_t.ndim)
        gain = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2)
        x0 = MEAN + gain * (x_t - signal * MEAN)
        return signal * (x_t - signal * x0) / sigma - sigma * x0

    return denoise


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def golden_file():
    return np.load(pathlib.Path(golden.__file__).with_name("diffusion.npz"))


def golden_sample(case, schedule):
    """Our sample of a case, with its own spacing; both in units of the largest value."""
    data, (fields, _, spacing, final, *_) = golden_file(), golden.CASES[case]
    spec = {"name": spacing, "train_steps": 1000, "num_steps": golden.STEPS}
    timesteps = registry.build("timesteps", spec)
    np.testing.assert_array_equal(timesteps, data[f"{case}_timesteps"])

    def denoise(x_t, timestep, conditioning):
        t = timestep.reshape(-1, *(1,) * (x_t.ndim - 1)).astype(jnp.float32)
        return golden.toy_network(x_t, t, jnp.sin)

    stepper = registry.build("stepper", fields)
    noise, options = jnp.asarray(data["noise"]), {"timesteps": timesteps, "final": final}
    result = sample(denoise, schedule, stepper, noise, None, **options)
    scale = np.abs(data[case]).max()
    return result / scale, data[case] / scale


@pytest.mark.parity
@pytest.mark.parametrize("case", sorted({*golden.CASES} - {"dpmpp_image_zero"}))
def test_agrees_with_diffusers(case):
    schedule = registry.build("schedule", golden.CASES[case].schedule)
    result, expected = golden_sample(case, schedule)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parity
def test_second_order_from_pure_noise_agrees_with_diffusers():
    """diffusers has no infinite log-SNR: it puts 2^-24 in the place of abar = 0."""
    case = "dpmpp_image_zero"
    exact = registry.build("schedule", golden.CASES[case].schedule)
    table = np.asarray(exact.alphas_cumprod, np.float64)
    table[-1] = 2.0**-24
    result, expected = golden_sample(case, NoiseSchedule.from_alphas_cumprod(table, "v"))
    np.testing.assert_allclose(result, expected, atol=1e-4)
    np.testing.assert_allclose(golden_sample(case, exact)[0], expected, atol=5e-3)


def test_converges_to_the_exact_solution():
    """The flow of Gaussian data maps noise linearly onto the data."""
    schedule, noise = cosine(), normal(256, 1)
    exact = MEAN + DEVIATION * noise

    def error(steps):
        options = {"num_steps": steps, "spacing": "trailing", "final": "one"}
        return jnp.abs(ddim(gaussian_denoiser(schedule), schedule, noise, **options) - exact).max()

    coarse, fine = error(10), error(100)
    assert fine < 0.05 and fine < 0.3 * coarse


def test_fresh_noise_keeps_the_distribution_and_follows_its_key():
    schedule, noise = cosine(), normal(4000, 1)
    denoise = gaussian_denoiser(schedule)

    @jax.jit
    def run(key):
        return ddim(denoise, schedule, noise, num_steps=100, eta=1.0, key=key)

    one = run(jax.random.key(1))
    assert abs(one.mean() - MEAN) < 0.05 and abs(one.std() - DEVIATION) < 0.05
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert jnp.abs(one - run(jax.random.key(2))).max() > 0.1


def test_final_level_is_the_first_of_the_table_or_clean():
    """A network that knows the clean sample: "one" returns it, "first" leaves a trace of noise."""
    schedule, noise = scaled_linear(prediction="x0"), normal(500, 2)
    clean = jnp.full((500, 2), 3.0)
    options = {"num_steps": 4}
    exact = ddim(lambda *_: clean, schedule, noise, final="one", **options)
    np.testing.assert_array_equal(exact, clean)
    trace = ddim(lambda *_: clean, schedule, noise, **options) - schedule.signal[0] * clean
    np.testing.assert_allclose(trace.std(), np.sqrt(0.00085), rtol=0.1)


def test_denoiser_sees_the_timesteps_and_the_conditioning():
    schedule, condition = cosine(num_steps=100, prediction="x0"), {"gain": jnp.array([2.0, 3.0])}

    def denoise(x_t, timestep, conditioning):
        assert timestep.shape == (2,) and timestep.dtype == jnp.int32
        return jnp.ones_like(x_t) * conditioning["gain"][:, None] + 0.0 * timestep[:, None]

    result = ddim(denoise, schedule, normal(2, 3), condition, num_steps=5, final="one")
    np.testing.assert_allclose(result, [[2.0] * 3, [3.0] * 3])


def test_an_nnx_network_plugs_in():
    network = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def denoise(x_t, timestep, conditioning):
        return network(x_t)

    result = jax.jit(lambda noise: ddim(denoise, cosine(), noise, num_steps=3))(normal(2, 4, 3))
    assert result.shape == (2, 4, 3) and jnp.isfinite(result).all()


def test_a_stepper_may_carry_state():
    class Counting(DDIM):
        def init(self, x_t):
            return jnp.zeros((), jnp.int32)

        def step(self, x_t, x0, eps, now, following, key, carry):
            return x_t * 0.0 + carry, carry + 1

    result = sample(
        lambda x_t, *_: x_t, cosine(), Counting(), normal(1, 2), None, timesteps=np.array([9, 5, 2])
    )
    np.testing.assert_array_equal(result, [[2.0, 2.0]])


def test_sampling_is_differentiable():
    schedule = cosine()

    def loss(gain):
        denoise = gaussian_denoiser(schedule)
        guided = lambda x_t, t, c: gain * denoise(x_t, t, c)  # noqa: E731
        return jnp.sum(ddim(guided, schedule, normal(4, 1), num_steps=5) ** 2)

    gradient = jax.grad(loss)(1.0)
    assert jnp.isfinite(gradient) and gradient != 0.0


BAD = {
    "must decrease": {"timesteps": np.array([1, 5])},
    "not be negative": {"timesteps": np.array([5, -1])},
    "beyond the schedule's 1000": {"timesteps": np.array([1000, 5])},
    "one of .* not 'two'": {"timesteps": np.array([5]), "final": "two"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, *_: x, cosine(), DDIM(), normal(1, 2), None, **BAD[message])


def test_missing_key_and_unknown_spacing_are_named():
    with pytest.raises(ValueError, match="pass key="):
        ddim(lambda x, *_: x, cosine(), normal(1, 2), eta=0.5)
    with pytest.raises(
        ValueError, match="Unknown timesteps 'karras'; known: leading, linspace, trailing"
    ):
        ddim(lambda x, *_: x, cosine(), normal(1, 2), spacing="karras")
    assert isinstance(registry.build("stepper", {"name": "ddim"}), sampling.DDIM)
