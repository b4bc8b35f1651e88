"""Embeddings of time, motion and the reference image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import SMALL, example

from d4d_jax.models.embeddings import (
    EmbeddingMLP,
    FourierMotionEmbedding,
    MotionEmbedding,
    sinusoidal,
)
from d4d_jax.models.unet import SpatioTemporalUNet


def test_cosines_come_first_and_frequencies_fall_to_one_over_the_period():
    waves = sinusoidal(jnp.array([0, 981]), 320)
    np.testing.assert_array_equal(waves[0], [1.0] * 160 + [0.0] * 160)
    frequencies = 10_000.0 ** (-np.arange(160) / 160)
    expected = np.concatenate([np.cos(981 * frequencies), np.sin(981 * frequencies)])
    np.testing.assert_allclose(waves[1], expected, atol=2e-4)


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="even width, not 5"):
        sinusoidal(jnp.zeros((1,)), 5)


def test_zero_initialised_mlp_answers_zero_and_the_plain_one_does_not():
    x = jnp.ones((2, 3, 16))
    zero, _ = EmbeddingMLP(8, zero_init=True).init_with_output(jax.random.key(0), x)
    plain, _ = EmbeddingMLP(8).init_with_output(jax.random.key(0), x)
    assert zero.shape == plain.shape == (2, 3, 8)
    assert (zero == 0.0).all() and jnp.abs(plain).max() > 0.0


@pytest.mark.parametrize("null", ["learnt", "zero"])
@pytest.mark.parametrize("make", [MotionEmbedding, FourierMotionEmbedding])
def test_dropped_motion_is_the_null_embedding(make, null):
    module, motion = make(4, null=null), jnp.array([3.0, 12.0])
    variables = module.init(jax.random.key(0), motion)
    params = jax.tree.map(lambda leaf: leaf + 0.5, variables["params"])
    assert ("null" in params) == (null == "learnt")
    kept = module.apply({"params": params}, motion)
    mixed = module.apply({"params": params}, motion, jnp.array([True, False]))
    np.testing.assert_array_equal(mixed[1], kept[1])
    np.testing.assert_array_equal(mixed[0], [0.5 if null == "learnt" else 0.0] * 4)
    assert jnp.abs(kept[0] - kept[1]).max() > 0.1


def test_unknown_null_is_refused():
    with pytest.raises(ValueError, match="'learnt' or 'zero', not 'mean'"):
        MotionEmbedding(4, null="mean").init(jax.random.key(0), jnp.ones((1,)))


def test_fourier_features_have_the_documented_waves():
    module = FourierMotionEmbedding(4, waves=2)
    found = module.features(jnp.array([0.0, 1.0, 8.0]))
    quarter = np.sqrt(0.5)
    expected = [[1, 1, 0, 0, 0], [quarter, 0, quarter, 1, 1], [1, 1, 0, 0, 8]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_embedder_of_a_network_is_chosen_by_name():
    inputs = example(SMALL)
    sizes = {}
    for name in ("mlp", "fourier"):
        model = SpatioTemporalUNet(**SMALL, motion_embedder=name)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        sizes[name] = shapes["motion_embedding"]["mlp"]["linear_1"]["kernel"].shape
    assert sizes == {"mlp": (1, 32), "fourier": (17, 32)}
    with pytest.raises(ValueError, match="Unknown motion_embedding 'wave'"):
        model = SpatioTemporalUNet(**SMALL, motion_embedder="wave")
        jax.eval_shape(model.init, jax.random.key(0), *inputs)
