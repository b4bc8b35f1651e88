"""Schedules: published tables, the algebra of predictions, timestep spacings."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_diffusion_golden as golden

from d4d_jax import schedules
from d4d_jax.registry import build
from d4d_jax.schedules import NoiseSchedule, cosine, leading, linspace, scaled_linear, trailing

STEPS = np.array([0, 1, 21, 100, 250, 500, 750, 900, 961, 981, 999])
TEXT = np.array(
    [
        0.99915,
        0.99829603,
        0.98038075,
        0.89422348,
        0.67379263,
        0.27633268,
        0.056169848,
        0.014151142,
        0.0072817271,
        0.0057755001,
        0.0046600985,
    ]
)
IMAGE = np.array(
    [
        0.99995872,
        0.99991257,
        0.99797104,
        0.97157429,
        0.84588071,
        0.49226454,
        0.14315546,
        0.023603291,
        0.0034975582,
        0.00078402986,
        0.0,
    ]
)


def samples(t):
    x0, noise = jax.random.normal(jax.random.key(0), (2, len(t), 4, 3))
    return x0, noise, jnp.asarray(t)


@pytest.mark.parametrize(("schedule", "golden"), [(scaled_linear(), TEXT), (cosine(), IMAGE)])
def test_tables_match_the_published_networks(schedule, golden):
    np.testing.assert_allclose(schedule.alphas_cumprod[STEPS], golden, rtol=2e-7)
    assert schedule.num_steps == 1000


@pytest.mark.parity
@pytest.mark.parametrize(("name", "make"), [("text", scaled_linear), ("image", cosine)])
def test_tables_and_conversions_agree_with_diffusers(name, make):
    data = np.load(pathlib.Path(golden.__file__).with_name("diffusion.npz"))
    # diffusers multiplies betas in float32 and takes 1 - abar there, which loses digits at t = 0.
    np.testing.assert_allclose(make().alphas_cumprod, data[f"{name}_alphas_cumprod"], atol=1e-6)
    x0, noise = jnp.asarray(data["pairs"])
    t = jnp.array(golden.TIMES)
    for prediction in schedules.PREDICTIONS:
        schedule = make(prediction=prediction)
        x_t = schedule.add_noise(x0, noise, t)
        np.testing.assert_allclose(x_t, data[f"{name}_noisy"], atol=1e-4)
        answer = golden.toy_network(x_t, t.reshape(-1, 1, 1).astype(jnp.float32), jnp.sin)
        expected = data[f"{name}_{prediction}_x0"]
        scale = np.maximum(np.abs(expected).max(axis=(1, 2), keepdims=True), 1.0)
        result = schedule.to_x0(answer, x_t, t)
        np.testing.assert_allclose(result / scale, expected / scale, atol=1e-4)
    velocity = make(prediction="v").target(x0, noise, t)
    np.testing.assert_allclose(velocity, data[f"{name}_velocity"], atol=1e-4)


@pytest.mark.parametrize("schedule", [scaled_linear(), cosine()])
def test_square_root_tables_keep_their_digits(schedule):
    signal, sigma = (np.asarray(v, np.float64) for v in (schedule.signal, schedule.sigma))
    np.testing.assert_allclose(signal**2 + sigma**2, 1.0, atol=2e-7)
    # 1 - abar from the float32 table would be off by about 1e-3 at t = 0.
    if schedule.prediction == "v":
        np.testing.assert_allclose(sigma[0] ** 2, 4.1284225e-5, rtol=1e-6)


def test_betas_of_the_cosine_schedule():
    table = np.asarray(cosine().signal, np.float64) ** 2
    betas = 1.0 - table[1:] / table[:-1]
    np.testing.assert_allclose(betas[[499, 997, 998]], [0.0031559126, 0.75796758, 1.0], rtol=1e-4)


def test_terminal_snr_is_zero_only_when_asked():
    assert cosine().snr(jnp.array([999]))[0] == 0.0
    assert scaled_linear(zero_terminal_snr=True).alphas_cumprod[-1] == 0.0
    assert scaled_linear().snr(jnp.array([999]))[0] > 0.0
    rescaled = scaled_linear(zero_terminal_snr=True).alphas_cumprod
    np.testing.assert_allclose(rescaled[0], scaled_linear().alphas_cumprod[0], rtol=1e-6)


def test_snr_is_the_ratio_of_variances():
    schedule, t = scaled_linear(), jnp.array([0, 250, 999])
    abar = TEXT[[0, 4, 10]]
    np.testing.assert_allclose(schedule.snr(t), abar / (1.0 - abar), rtol=1e-5)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_every_prediction_gives_back_sample_noise_and_velocity(prediction):
    schedule = cosine(prediction=prediction)
    x0, noise, t = samples([1, 200, 500, 900])
    x_t = schedule.add_noise(x0, noise, t)
    answer = schedule.target(x0, noise, t)
    velocity = cosine(prediction="v").target(x0, noise, t)
    np.testing.assert_allclose(schedule.to_x0(answer, x_t, t), x0, atol=2e-5)
    np.testing.assert_allclose(schedule.to_eps(answer, x_t, t), noise, atol=2e-4)
    np.testing.assert_allclose(schedule.to_v(answer, x_t, t), velocity, atol=2e-4)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_conversions_are_finite_without_any_signal(prediction):
    schedule = cosine(prediction=prediction)
    x0, noise, t = samples([999, 999])
    x_t, answer = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    np.testing.assert_array_equal(x_t, noise)
    for convert in (schedule.to_x0, schedule.to_eps, schedule.to_v):
        value, gradient = jax.value_and_grad(lambda a, f=convert: f(a, x_t, t).sum())(answer)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    np.testing.assert_allclose(schedule.to_eps(answer, x_t, t), noise, atol=1e-6)
    if prediction != "eps":
        np.testing.assert_allclose(schedule.to_x0(answer, x_t, t), x0, atol=1e-6)


def test_schedule_is_a_pytree_that_jit_takes():
    x0, noise, t = samples([10, 20])
    schedule = cosine()
    noisy = jax.jit(lambda schedule: schedule.add_noise(x0, noise, t))(schedule)
    np.testing.assert_allclose(noisy, schedule.add_noise(x0, noise, t), rtol=1e-6)
    assert jax.tree.map(lambda leaf: leaf, schedule).prediction == "v"


def test_leading_spacing_is_videomvs():
    steps = leading(1000, 50)
    assert steps[:3].tolist() == [981, 961, 941] and steps[-2:].tolist() == [21, 1]
    assert len(steps) == 50


def test_trailing_spacing_starts_at_the_last_step():
    assert trailing(1000, 50)[[0, 1, -1]].tolist() == [999, 979, 19]
    assert trailing(1000, 1).tolist() == [999]
    assert len(set(trailing(1000, 30).tolist())) == 30


def test_linspace_spacing_leaves_the_last_move_to_the_sampler():
    assert linspace(1000, 50)[[0, 1, -1]].tolist() == [999, 979, 20]
    assert linspace(1000, 1).tolist() == [999]
    assert linspace(1000, 999).tolist() == list(range(999, 0, -1))
    with pytest.raises(ValueError, match="at most 999 steps"):
        linspace(1000, 1000)


@pytest.mark.parametrize("spacing", [leading, trailing, linspace])
@pytest.mark.parametrize("count", [0, 1001])
def test_impossible_step_counts_are_refused(spacing, count):
    with pytest.raises(ValueError, match=f"between 1 and .* not {count}"):
        spacing(1000, count)


@pytest.mark.parametrize("count", [600, 1000])
def test_leading_strides_that_miss_the_noise_are_refused(count):
    with pytest.raises(ValueError, match=f'{count} leading steps of 1000 .* spacing "trailing"'):
        leading(1000, count)
    assert leading(1000, 30)[0] == 958 and trailing(1000, count)[0] == 999


def test_schedules_and_spacings_are_built_by_name():
    spec = {"name": "cosine", "num_steps": 10, "prediction": "x0"}
    schedule = build("schedule", spec)
    assert schedule.num_steps == 10 and schedule.prediction == "x0"
    assert build("timesteps", {"name": "trailing", "train_steps": 10, "num_steps": 5})[0] == 9


def test_bad_tables_and_predictions_are_refused():
    with pytest.raises(ValueError, match="decreasing sequence"):
        NoiseSchedule.from_alphas_cumprod([0.5, 0.9])
    with pytest.raises(ValueError, match="decreasing sequence"):
        NoiseSchedule.from_alphas_cumprod([1.5, 0.9])
    with pytest.raises(ValueError, match="not 'score'"):
        cosine(prediction="score")
