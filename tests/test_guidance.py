"""Guidance: the algebra of Eq. 3 and what each branch is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax import registry
from d4d_jax.guidance import (
    ClassifierFree,
    Interval,
    Ramp,
    ThreeDAware,
    from_config,
    rescaled,
)
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.sampling import ddim
from d4d_jax.schedules import cosine

X = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
T = jnp.array([3, 500])
CONDITIONING = Conditioning(
    image=jnp.ones((2, 2, 2, 1)),
    camera=jnp.broadcast_to(jnp.eye(4), (2, 3, 4, 4)),
    motion=jnp.array([5.0, 10.0]),
)


def spread(value):
    return jnp.reshape(value, (-1, 1, 1, 1, 1))


def network(x_t, timestep, conditioning):
    """Adds 100 for a prompt and the motion magnitude for a motion that is not dropped."""
    ones = jnp.ones((x_t.shape[0],))
    kept = ones if conditioning.drop_text is None else ~conditioning.drop_text
    moving = ones if conditioning.drop_motion is None else ~conditioning.drop_motion
    assert conditioning.camera.shape[0] == x_t.shape[0] == timestep.shape[0]
    return x_t + spread(100.0 * kept + conditioning.motion * moving + 0.001 * timestep)


COND, UNCOND, STILL = (
    X + spread(extra + 0.001 * T)
    for extra in (100.0 + CONDITIONING.motion, jnp.zeros(2), jnp.full((2,), 100.0))
)


@pytest.mark.parametrize("batched", [True, False])
def test_classifier_free_extrapolates_from_unconditional_to_conditional(batched):
    guided = ClassifierFree(3.0, batched=batched)(network)(X, T, CONDITIONING)
    np.testing.assert_allclose(guided, UNCOND + 3.0 * (COND - UNCOND), rtol=1e-5)


def test_scale_one_is_the_network_and_zero_ignores_the_prompt():
    one = ClassifierFree(1.0)(network)(X, T, CONDITIONING)
    np.testing.assert_allclose(one, COND, rtol=1e-5)
    zero = ClassifierFree(0.0)(network)(X, T, CONDITIONING)
    np.testing.assert_allclose(zero, UNCOND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_three_d_aware_is_equation_three(batched):
    guided = ThreeDAware(batched=batched)(network)(X, T, CONDITIONING)
    expected = COND + 7.0 * (COND - UNCOND) + 0.5 * (COND - STILL)
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


def test_a_separate_static_network_is_asked_for_a_static_object():
    def static(x_t, timestep, conditioning):
        assert conditioning.image is CONDITIONING.image
        np.testing.assert_array_equal(conditioning.motion, 0.0)
        return 0.25 * x_t

    guided = ThreeDAware(2.0, 0.5, static)(network)(X, T, CONDITIONING)
    expected = COND + 2.0 * (COND - UNCOND) + 0.5 * (COND - 0.25 * X)
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


@pytest.mark.parametrize(("w1", "w2"), [(0.0, 0.0), (7.0, 0.5), (3.0, 0.0), (0.0, 2.0)])
def test_weights_sum_to_one(w1, w2):
    """Where all branches agree, guidance changes nothing."""
    guided = ThreeDAware(w1, w2)(lambda x, t, c: 2.0 * x)(X, T, CONDITIONING)
    np.testing.assert_allclose(guided, 2.0 * X, rtol=1e-5)


def test_without_the_static_branch_it_is_classifier_free():
    plain = ClassifierFree(8.0)(network)(X, T, CONDITIONING)
    np.testing.assert_allclose(ThreeDAware(7.0, 0.0)(network)(X, T, CONDITIONING), plain, rtol=1e-5)


@pytest.mark.parametrize(("w1", "w2", "size"), [(7.0, 0.5, 6), (7.0, 0, 4), (0, 0.5, 4), (0, 0, 2)])
def test_one_call_computes_the_branches_that_are_needed(w1, w2, size):
    sizes = []

    def counting(x_t, timestep, conditioning):
        sizes.append(x_t.shape[0])
        return network(x_t, timestep, conditioning)

    ThreeDAware(w1, w2)(counting)(X, T, CONDITIONING)
    assert sizes == [size]


def test_weights_may_be_traced():
    def run(w1, w2):
        return ThreeDAware(w1, w2)(network)(X, T, CONDITIONING)

    np.testing.assert_allclose(jax.jit(run)(7.0, 0.5), run(7.0, 0.5), rtol=1e-5)


def test_velocity_and_noise_are_guided_alike():
    """Eq. 3 on v equals Eq. 3 on the noise that v stands for."""
    schedule = cosine()
    guided = ThreeDAware()(network)(X, T, CONDITIONING)

    def noise(x_t, timestep, conditioning):
        return schedule.to_eps(network(x_t, timestep, conditioning), x_t, timestep)

    np.testing.assert_allclose(
        schedule.to_eps(guided, X, T), ThreeDAware()(noise)(X, T, CONDITIONING), rtol=1e-4
    )


def test_any_conditioning_works_with_functions_and_inside_a_sampler():
    """A plain closure whose condition is a dictionary, built by name."""
    spec = {"name": "three_d_aware", "w1": 1.0, "w2": 0.5}

    def denoise(x_t, timestep, conditioning):
        return conditioning["level"][:, None] * jnp.ones_like(x_t)

    spec |= {
        "unconditional": lambda c: {"level": 0.0 * c["level"]},
        "static": lambda c: {"level": 0.5 * c["level"]},
    }
    guided = registry.build("guidance", spec)(denoise)
    level = jnp.array([1.0, 2.0])
    noise = jax.random.normal(jax.random.key(0), (2, 3))
    run = functools.partial(ddim, guided, cosine(prediction="x0"), num_steps=3, final="one")
    np.testing.assert_allclose(
        run(noise, {"level": level}), np.repeat(level[:, None], 3, 1) * 2.25, rtol=1e-5
    )


def test_weights_may_depend_on_the_timestep():
    ramp = Ramp(noisy=8.0, clean=2.0)
    np.testing.assert_allclose(ramp(jnp.array([0, 999])), [2.0, 8.0])
    interval = Interval(3.0, 200, 800, outside=1.0)
    np.testing.assert_array_equal(interval(jnp.array([199, 200, 799, 800])), [1, 3, 3, 1])
    times = jnp.array([100, 500])
    cond, uncond = (
        network(X, times, told) for told in (CONDITIONING, CONDITIONING.without_prompt())
    )
    guided = ClassifierFree(interval)(network)(X, times, CONDITIONING)
    np.testing.assert_allclose(guided[0], cond[0], rtol=1e-5)
    np.testing.assert_allclose(guided[1], uncond[1] + 3 * (cond - uncond)[1], rtol=1e-5)
    still = network(X, times, CONDITIONING.with_motion(0.0))
    guided = ThreeDAware(0.0, ramp)(network)(X, times, CONDITIONING)
    expected = cond + spread(ramp(times)) * (cond - still)
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


def test_guidance_with_scheduled_weights_comes_from_a_configuration():
    config = {"name": "three_d_aware", "w1": {"name": "ramp", "noisy": 8, "clean": 2}, "w2": 0.5}
    assert from_config(config) == ThreeDAware(Ramp(8, 2), 0.5)
    with pytest.raises(ValueError, match="Unknown weight 'step'"):
        from_config({"name": "three_d_aware", "w1": {"name": "step"}})


def test_rescaling_gives_the_deviation_of_the_conditional_prediction():
    cond, guided = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 4, 5)).astype(np.float32)
    guided = 3 * guided
    full = rescaled(jnp.asarray(guided), jnp.asarray(cond), 1.0)
    for a, b in zip(full, cond, strict=True):
        assert float(jnp.std(a, ddof=1)) == pytest.approx(float(np.std(b, ddof=1)), rel=1e-5)
    half = rescaled(jnp.asarray(guided), jnp.asarray(cond), 0.5)
    np.testing.assert_allclose(half, (full + guided) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rescaled(jnp.asarray(guided), jnp.asarray(cond), 0.0), guided)
    plain = ThreeDAware(2.0, 1.0)(network)(X, T, CONDITIONING)
    after = ThreeDAware(2.0, 1.0, rescale=0.7)(network)(X, T, CONDITIONING)
    expected = rescaled(plain, network(X, T, CONDITIONING), 0.7)
    np.testing.assert_allclose(after, expected, rtol=1e-5)


@pytest.mark.live
def test_rescaling_is_that_of_diffusers():
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(5)
    guided, conditional = 2 * rng.normal(size=(3, 4, 5, 5, 4)), rng.normal(size=(3, 4, 5, 5, 4))
    expected = rescale_noise_cfg(torch.as_tensor(guided), torch.as_tensor(conditional), 0.7)
    found = rescaled(jnp.asarray(guided), jnp.asarray(conditional), 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
