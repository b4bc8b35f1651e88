"""Per-frame layers against direct computations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models import layers
from d4d_jax.models.layers import (
    Attention,
    Dense,
    Downsample,
    FeedForward,
    GroupNorm,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def init(module, *inputs):
    """Random parameters without zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("over_frames", [False, True])
def test_group_norm_has_the_statistics_of_a_frame_or_of_the_clip(over_frames):
    x = normal(2, 3, 4, 5, 6) * 3.0 + 2.0
    module = GroupNorm(1e-2, over_frames, groups=2)
    variables = init(module, x)
    grouped = np.asarray(x).reshape(2, 3, 4, 5, 2, 3)
    axes = (1, 2, 3, 5) if over_frames else (2, 3, 5)
    mean, variance = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + 1e-2)).reshape(x.shape)
    expected = normed * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_keeps_float32_statistics_under_bfloat16():
    x = (normal(1, 1, 8, 8, 2) * 0.1 + 100.0).astype(jnp.bfloat16)
    module = GroupNorm(dtype=jnp.bfloat16)
    output = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])(x)
    assert output.dtype == jnp.bfloat16 and jnp.isfinite(output).all()
    assert abs(float(output.mean())) < 0.05


def test_group_norm_names_channels_that_do_not_split():
    with pytest.raises(ValueError, match="6 channels do not split into 4"):
        GroupNorm(groups=4).init(jax.random.key(0), normal(1, 1, 2, 2, 6))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 4, 3)])
def test_dense_acts_on_the_last_axis(shape):
    x, module = normal(*shape), Dense(5)
    variables = init(module, x)
    expected = np.asarray(x) @ variables["params"]["kernel"] + variables["params"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def reference_attention(module, variables, x, source):
    """Queries (n, p, c) against keys (n, q, e), through JAX's own attention."""
    params = variables["params"]

    def split(y, name):
        y = y @ params[name]["kernel"]
        return y.reshape(*y.shape[:-1], module.heads, module.head_dim)

    mixed = jax.nn.dot_product_attention(
        split(x, "query"), split(source, "key"), split(source, "value")
    )
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return mixed @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("over", ["space", "time", "context"])
def test_attention_looks_where_it_should(over):
    x, context = normal(2, 3, 5, 4), normal(2, 7, 6, seed=1)
    module = Attention(heads=2, head_dim=3, over=over)
    inputs = (x, context) if over == "context" else (x,)
    variables = init(module, *inputs)
    if over == "time":
        tokens = x.swapaxes(1, 2).reshape(10, 3, 4)
        expected = reference_attention(module, variables, tokens, tokens)
        expected = expected.reshape(2, 5, 3, 4).swapaxes(1, 2)
    else:
        tokens = x.reshape(6, 5, 4)
        source = tokens if over == "space" else jnp.repeat(context, 3, axis=0)
        expected = reference_attention(module, variables, tokens, source).reshape(x.shape)
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, *inputs), expected, rtol=1e-4, atol=1e-4
    )


def test_cross_attention_without_context_is_refused():
    with pytest.raises(ValueError, match="'context' and context None do not match"):
        Attention(1, 4, "context").init(jax.random.key(0), normal(1, 1, 2, 4))


def test_feed_forward_gates_with_the_exact_gelu():
    x, module = normal(4, 2), FeedForward(expansion=3)
    variables = init(module, x)
    params = variables["params"]
    hidden = np.asarray(x) @ params["gated"]["kernel"] + params["gated"]["bias"]
    value, gate = hidden[:, :6], hidden[:, 6:]
    gate = gate * 0.5 * (1.0 + np.vectorize(math.erf)(gate / math.sqrt(2.0)))
    expected = (value * gate) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=2e-5)


def test_downsample_pads_every_side():
    """Output cell (i, j) is centred on input cell (2 i, 2 j)."""
    x, module = normal(1, 1, 4, 6, 1), Downsample()
    variables = init(module, x)
    kernel, bias = (variables["params"]["conv"][k] for k in ("kernel", "bias"))
    padded = np.pad(np.asarray(x)[0, 0, :, :, 0], 1)
    expected = [
        [np.sum(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel[..., 0, 0]) for j in range(3)]
        for i in range(2)
    ]
    output = jax.jit(module.apply)(variables, x)[0, 0, :, :, 0] - bias
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_upsample_repeats_the_nearest_cell():
    x, module = normal(1, 2, 2, 3, 1), Upsample()
    identity = np.zeros((3, 3, 1, 1), np.float32)
    identity[1, 1] = 1.0
    variables = {"params": {"conv": {"kernel": identity, "bias": np.zeros(1, np.float32)}}}
    expected = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-6)


def test_residual_block_and_spatial_transformer_start_as_the_identity():
    x, embedding = normal(1, 2, 4, 4, 8), normal(1, 2, 16, seed=1)
    block, transformer = ResidualBlock(8, groups=4), SpatialTransformer(2, 4, groups=4)
    key = jax.random.key(0, impl="rbg")  # compiles faster
    output, _ = jax.jit(block.init_with_output)(key, x, embedding)
    np.testing.assert_array_equal(output, x)
    output, _ = jax.jit(transformer.init_with_output)(key, x, normal(1, 5, 6, seed=2))
    np.testing.assert_array_equal(output, x)


def test_initial_weights_are_uniform_within_one_over_the_root_of_the_inputs():
    kernel = layers.fan_in_uniform(jax.random.key(0), (3, 3, 16, 32), jnp.float32)
    assert 0.99 / 12 < jnp.abs(kernel).max() <= 1 / 12
