"""Layers across frames: what they see, and what they are before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax import registry
from d4d_jax.models import temporal

OPTIONS = {"heads": 2, "head_dim": 3, "groups": 2}


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def randomised(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", registry.names("temporal_mixer"))
def test_every_mixer_starts_as_the_identity(name):
    x = normal(1, 3, 2, 2, 4)
    mixer = registry.build("temporal_mixer", {"name": name, **OPTIONS})
    key = jax.random.key(0, impl="rbg")  # compiles faster
    output, _ = jax.jit(mixer.init_with_output)(key, x)
    np.testing.assert_array_equal(output, x)


def test_attention_is_blind_to_the_order_of_frames_and_mixes_nothing_but_frames():
    x = normal(1, 4, 2, 2, 4)
    module = temporal.TemporalTransformer(**OPTIONS)
    variables, apply = randomised(module, x), jax.jit(module.apply)
    output, order = apply(variables, x), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        apply(variables, x[:, order]), output[:, order], rtol=1e-4, atol=1e-4
    )
    # Positions only meet in the normalisation: swapping them swaps the result.
    flipped = apply(variables, x[:, :, ::-1])
    np.testing.assert_allclose(flipped, output[:, :, ::-1], rtol=1e-4, atol=1e-4)
    moved = jnp.abs(apply(variables, x.at[:, 0, 0, 0, 0].add(1.0)) - output)
    assert moved[0, 3, 0, 0].max() > 1e-4


def test_convolution_is_a_zero_padded_correlation_over_frames():
    x = normal(1, 4, 2, 1, 2)
    module = temporal._FrameConv(jax.nn.initializers.normal(), jnp.float32)
    variables = randomised(module, x)
    kernel, bias = (variables["params"]["conv"][k] for k in ("kernel", "bias"))
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    expected = bias + sum(padded[:, k : k + 4] @ kernel[k, 0] for k in range(3))
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_works_in_the_later_stages_only_while_training():
    x = normal(1, 3, 2, 2, 4)
    module = temporal.TemporalConv(dropout=0.5, groups=2)
    variables = randomised(module, x)

    @jax.jit
    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, x, train=True, rngs=rngs), module.apply(variables, x)

    (one, plain), (other, same) = run(0), run(1)
    assert jnp.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(plain, same)
