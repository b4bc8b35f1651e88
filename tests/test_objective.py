"""The objective: what is drawn for a clip is its own, and what it is told can be dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d4d_jax.motion import MotionCondition
from d4d_jax.objective import DiffusionObjective, draw_noise, draw_timesteps
from d4d_jax.schedules import cosine
from d4d_jax.train.state import create_state
from d4d_jax.train.validation import Validation


class Identity:
    """A codec that changes nothing."""

    def encode(self, params, images):
        return jnp.asarray(images)

    def decode(self, params, latents):
        return latents


@dataclasses.dataclass(frozen=True)
class Told:
    """A network that answers with a number: the sum of what it is told, plus its parameter."""

    static_channels: int = 4

    def apply(self, variables, x_t, timestep, told, train=False, rngs=None):
        def kept(drop):
            return 1.0 if drop is None else ~drop

        value = (
            1.0 * kept(told.drop_text)
            + 10.0 * kept(told.drop_image)
            + 100.0 * kept(told.drop_static) * (told.static is not None)
            + 1000.0 * kept(told.drop_motion)
        )
        return variables["params"] + jnp.zeros_like(x_t) + jnp.reshape(value, (-1, 1, 1, 1, 1))


def batch(size=4, keys=True):
    rng = np.random.default_rng(0)
    frames = rng.uniform(-1, 1, (2, size, 3, 4, 4, 4)).astype(np.float32)
    found = {
        "dynamic": frames[0],
        "static": frames[1],
        "camera": np.tile(np.eye(4, dtype=np.float32), (size, 3, 1, 1)),
        "motion": np.arange(size, dtype=np.float32),
    }
    if keys:
        found["key"] = rng.integers(2**32, size=(size, 2), dtype=np.uint32)
    return found


def objective(**options):
    return DiffusionObjective(Told(), Identity(), cosine(prediction="x0"), **options)


FROZEN = {"codec": {}}
KEY = jax.random.key(0)
PARAMS = jnp.float32(0)


def test_loss_is_that_of_the_clips_in_any_order_and_in_parts():
    whole = batch()
    full = objective(drop_prompt=0.5, drop_static=0.5)
    loss, terms = full(PARAMS, FROZEN, whole, KEY)
    turned = {name: value[::-1] for name, value in whole.items()}
    np.testing.assert_allclose(full(PARAMS, FROZEN, turned, KEY)[0], loss, rtol=1e-6)
    halves = [{name: value[part] for name, value in whole.items()} for part in np.s_[:2, 2:]]
    parts = [full(PARAMS, FROZEN, half, jax.random.key(7))[0] for half in halves]
    np.testing.assert_allclose(np.mean(parts), loss, rtol=1e-6)
    np.testing.assert_allclose(loss, terms["denoising"] + terms["motion"], rtol=1e-6)


def test_without_keys_the_draws_are_those_of_the_step():
    full, clips = objective(drop_static=0.5), batch(64, keys=False)
    first, again, other = (
        full(PARAMS, FROZEN, clips, jax.random.key(seed))[0] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1111}),
        ({"drop_prompt": 1.0}, {1100}),
        ({"drop_text": 1.0}, {1110}),
        ({"drop_image": 1.0}, {1101}),
        ({"drop_static": 1.0}, {1011}),
        ({"drop_motion": 1.0}, {111}),
        ({"drop_text": 1.0, "drop_static": 1.0, "drop_motion": 1.0}, {10}),
        # Together: never one of text and image without the other.
        ({"drop_prompt": 0.5}, {1111, 1100}),
        ({"drop_text": 0.5, "drop_image": 0.5}, {1111, 1110, 1101, 1100}),
    ],
)
def test_conditions_are_dropped_together_and_on_their_own(options, expected):
    none = {"drop_prompt": 0.0, "drop_motion": 0.0}
    seen = []

    class Listening(Told):
        def apply(self, *arguments, **named):
            answer = super().apply(*arguments, **named)
            seen.extend(np.asarray(answer[:, 0, 0, 0, 0]).tolist())
            return answer

    full = dataclasses.replace(objective(**(none | options)), network=Listening())
    full(PARAMS, FROZEN, batch(64), KEY)
    assert set(seen) == expected


def test_evaluation_has_no_chance_and_all_conditions():
    full, clips = objective(drop_prompt=1.0, drop_motion=1.0), batch()
    times = jnp.array([10, 200, 500, 900])
    found = full.evaluate(PARAMS, FROZEN, clips, times)
    expected = np.square(1111 - clips["dynamic"]).mean((1, 2, 3, 4))
    np.testing.assert_allclose(found["denoising"], expected, rtol=1e-5)


def test_cached_latents_are_the_same_as_frames():
    clips = batch()
    cached = {name: value for name, value in clips.items() if name not in ("dynamic", "static")}
    cached |= {f"{view}_latents": clips[view] for view in ("dynamic", "static")}
    losses = [objective()(PARAMS, FROZEN, given, KEY)[0] for given in (clips, cached)]
    assert losses[0] == losses[1]


def test_motion_condition_has_a_space_a_scale_and_a_reduction():
    clips = batch(2)
    latents, static = (jnp.asarray(clips[view]) for view in ("dynamic", "static"))
    told = MotionCondition().of_batch(clips, latents, static)
    np.testing.assert_array_equal(told, clips["motion"])
    sums = MotionCondition(scale=1.0, reduction="sum").of_batch(clips, latents, static)
    np.testing.assert_allclose(sums, clips["motion"] / 100 * 4 * 4 * 3, rtol=1e-6)
    inside = MotionCondition("latent", 2.0).of_batch(clips, latents, static)
    expected = 2 * np.square(clips["dynamic"] - clips["static"]).mean((1, 2, 3, 4))
    np.testing.assert_allclose(inside, expected, rtol=1e-5)
    del clips["static"]
    with pytest.raises(ValueError, match="cached latents have none"):
        MotionCondition(reduction="sum").of_batch(clips, latents, static)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"space": "voxel"}, "not 'voxel'"),
        ({"reduction": "max"}, "not 'max'"),
        ({"scale": 0}, "positive, not 0"),
    ],
)
def test_wrong_motion_conditions_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MotionCondition(**options)


def test_wrong_probabilities_are_named():
    with pytest.raises(ValueError, match=r"drop_text must lie in \[0, 1\], but it is 1.5"):
        objective(drop_text=1.5)


def test_timesteps_favour_the_noisy_end():
    keys = jax.random.split(jax.random.key(0), 4000)
    even, shifted = (draw_timesteps(keys, 1000, shift) for shift in (1.0, 4.0))
    for steps in (even, shifted):
        assert steps.min() >= 0 and steps.max() <= 999
    assert abs(float((even >= 750).mean()) - 0.25) < 0.03
    # u / (4 - 3 u) = 0.75 at u = 3/7: four sevenths of the draws lie above.
    assert abs(float((shifted >= 750).mean()) - 4 / 7) < 0.03


def test_offset_noise_moves_whole_clips_and_none_leaves_the_draws_alone():
    keys, shape = jax.random.split(jax.random.key(1), 400), (4, 5, 5, 3)
    plain = draw_noise(keys, shape, 0.0)
    np.testing.assert_array_equal(plain[7], jax.random.normal(keys[7], shape))
    means = (draw_noise(keys, shape, 0.5) - plain).reshape(400, -1, 3)
    np.testing.assert_allclose(means, np.broadcast_to(means[:, :1], means.shape), atol=1e-6)
    np.testing.assert_allclose(np.std(means[:, 0]), 0.5, rtol=0.1)
    assert abs(np.corrcoef(means[:, 0].T)[0, 1]) < 0.15


def test_validation_spreads_timesteps_and_is_the_same_every_time():
    clips = [{"number": np.float32(i)} for i in range(3)]
    asked = []

    def evaluate(params, frozen, batch, timestep):
        assert batch["key"].shape == (4, 2)
        return {"error": params * timestep + batch["number"]}

    def listening(params, frozen, batch, timestep):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), timestep)
        return evaluate(params, frozen, batch, timestep)

    check = Validation(listening, clips, num_timesteps=1000)
    state = create_state(jnp.float32(1), optax.sgd(0.1), KEY)
    first, again = check(state), check(state)
    jax.effects_barrier()
    assert first == again
    times = np.array(asked[:3])
    np.testing.assert_array_equal(times // 250, np.tile(np.arange(4), (3, 1)))
    assert first["val_error"] == pytest.approx(times.mean() + 1)
    assert first["val_error_2of4"] == pytest.approx(times[:, 1].mean() + 1)
