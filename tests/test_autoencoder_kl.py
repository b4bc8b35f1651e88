"""The autoencoder and its codec: sizes, chunks, tiles, samples, alpha, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from d4d_jax import registry
from d4d_jax.models.autoencoder_kl import (
    VARIANTS,
    AutoencoderKL,
    KLCodec,
    PadDownsample,
    to_posterior,
)
from d4d_jax.models.layers import GroupNorm
from d4d_jax.models.tiling import _tile_axis, blend_tiles
from d4d_jax.typing import Codec

TOY = {"width": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4}
VARIANTS["toy"] = TOY  # cells of 2 x 2 pixels
CODEC = KLCodec("toy")

encode = jax.jit(KLCodec.encode, static_argnums=0)
decode = jax.jit(KLCodec.decode, static_argnums=0)


@pytest.fixture(scope="module", autouse=True)
def variant():
    yield
    del VARIANTS["toy"]


@pytest.fixture(scope="module")
def params():
    """Of the toy autoencoder, none of them at its initial zero."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(CODEC.init, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(shape):
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        return jnp.asarray(values if len(shape) > 1 else 0.5 + 0.2 * values, jnp.float32)

    return jax.tree.unflatten(tree, [draw(leaf.shape) for leaf in leaves])


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def latents(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_parameters_and_shapes_of_stable_diffusion():
    codec = KLCodec()
    params = jax.eval_shape(codec.init, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == 83_653_863
    assert len(jax.tree.leaves(params)) == 248
    clip = jax.ShapeDtypeStruct((2, 6, 256, 192, 3), jnp.float32)
    encoded = jax.eval_shape(codec.encode, params, clip)
    assert encoded.shape == (2, 6, 32, 24, 4)
    assert jax.eval_shape(codec.decode, params, encoded).shape == clip.shape


def test_every_normalisation_has_the_epsilon_of_the_reference():
    seen = []

    def spy(run, args, kwargs, context):
        if isinstance(context.module, GroupNorm) and context.method_name == "__call__":
            seen.append(context.module.epsilon)
        return run(*args, **kwargs)

    model = AutoencoderKL()
    with nn.intercept_methods(spy):
        jax.eval_shape(model.init, jax.random.key(0), images(1, 8, 8, 3))
    residual = 2 * (8 + 12 + 2 * 2)  # down, up, and the middles
    assert len(seen) == residual + 2 + 2 and set(seen) == {1e-6}


def test_downsampling_pads_at_the_bottom_and_on_the_right():
    x = jnp.asarray(images(1, 1, 6, 8, 1))
    layer = PadDownsample()

    def tap(row, column):
        kernel = jnp.zeros((3, 3, 1, 1)).at[row, column].set(1.0)
        return layer.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}, x)

    np.testing.assert_array_equal(tap(0, 0), x[:, :, ::2, ::2])
    beyond = jnp.pad(x[:, :, 2::2, 2::2], ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(tap(2, 2), beyond)


@pytest.mark.parametrize("chunk", [0, 2, 9])
def test_chunks_change_nothing(params, chunk):
    frames = images(1, 5, 16, 24, 3)
    key = jax.random.key(3)
    codec, whole = KLCodec("toy", chunk=chunk), KLCodec("toy", chunk=5)
    wanted = encode(whole, params, frames, key=key)
    assert wanted.shape == (1, 5, 8, 12, 4) and wanted.std() > 0.05
    np.testing.assert_allclose(encode(codec, params, frames, key=key), wanted, atol=1e-5)
    decoded = decode(codec, params, wanted)
    assert decoded.shape == frames.shape
    np.testing.assert_allclose(decoded, decode(whole, params, wanted), atol=1e-4)


def test_frames_do_not_see_each_other(params):
    frames = images(2, 16, 16, 3)
    changed = frames.copy()
    changed[1] *= -1
    moved = np.abs(encode(CODEC, params, changed) - encode(CODEC, params, frames)).max((1, 2, 3))
    assert moved[1] > 0.01 and moved[0] == 0


def test_samples_follow_the_posterior(params):
    frames = images(2, 16, 16, 3)
    model = AutoencoderKL(**TOY, scale=0.5)
    run = jax.jit(model.apply, static_argnames="method")
    mean, logvar = run({"params": params}, frames, method="posterior")
    np.testing.assert_allclose(encode(CODEC, params, frames), 0.18215 * mean, atol=1e-6)
    posterior = to_posterior(jnp.concatenate([mean, logvar], -1))
    draws = jax.vmap(posterior.draw)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(draws.std(0), jnp.exp(0.5 * logvar), rtol=0.06)
    key = jax.random.key(0)
    sample = run({"params": params}, frames, key, method="encode")
    np.testing.assert_allclose(sample, 0.5 * posterior.draw(key), atol=1e-6)
    sample = encode(CODEC, params, frames, key=key)
    np.testing.assert_allclose(sample, 0.18215 * posterior.draw(key), atol=1e-6)


def test_the_log_variance_is_clipped():
    moments = jnp.array([1.0, 2.0, 3.0, -1e4, 0.5, 1e4]).reshape(1, 1, 6)
    mean, logvar = to_posterior(moments)
    assert mean.ravel().tolist() == [1, 2, 3] and logvar.ravel().tolist() == [-30, 0.5, 20]


def test_the_scale_is_divided_out_again(params):
    z = latents(2, 8, 8, 4)
    decoded = decode(KLCodec("toy", scale=2.0), params, z * 2.0 / 0.18215)
    np.testing.assert_allclose(decoded, decode(CODEC, params, z), atol=1e-4)


def test_only_the_encoder_heeds_the_compute_type(params):
    half = KLCodec("toy", dtype="bfloat16")
    frames, z = images(2, 16, 16, 3), latents(2, 8, 8, 4)
    np.testing.assert_array_equal(decode(half, params, z), decode(CODEC, params, z))
    encoded, wanted = encode(half, params, frames), encode(CODEC, params, frames)
    assert encoded.dtype == jnp.float32 and (encoded != wanted).any()
    np.testing.assert_allclose(encoded, wanted, atol=0.05)


@pytest.mark.parametrize("background", [1.0, 0.0, 0.25])
def test_alpha_moves_the_colours_onto_the_background(params, background):
    color, alpha = 0.5 + 0.5 * images(2, 16, 16, 3), 0.5 + 0.5 * images(2, 16, 16, 1, seed=1)
    on_white = np.concatenate([color * alpha + 1 - alpha, alpha], -1)
    wanted = encode(CODEC, params, 2 * (color * alpha + (1 - alpha) * background) - 1)
    codec = KLCodec("toy", background=background)
    np.testing.assert_allclose(encode(codec, params, 2 * on_white - 1), wanted, atol=1e-5)


@settings(deadline=None)
@given(size=st.integers(1, 60), tile=st.integers(1, 20), overlap=st.floats(0, 0.99))
def test_tiles_cover_an_axis(size, tile, overlap):
    overlap = int(overlap * tile)
    starts, weights = _tile_axis(size, tile, overlap, 3)
    ends = starts + min(tile, size)
    assert starts[0] == 0 and ends[-1] == size
    assert (ends[:-1] - starts[1:] >= overlap).all()
    total = np.zeros(3 * size)
    for start, weight in zip(starts, weights, strict=True):
        total[3 * start : 3 * start + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("cells", [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("size", [(11, 4), (3, 9)])
def test_tiles_of_a_local_function_join_exactly(size, cells):
    inner, outer = cells

    def local(x):
        x = x[:, ::inner, ::inner]
        return jnp.concatenate([jnp.sin(x), x * x], -1).repeat(outer, 1).repeat(outer, 2)

    x = jnp.asarray(images(2, inner * size[0], inner * size[1], 2))
    tiles = functools.partial(blend_tiles, local, tile=5, overlap=2, cells=cells)
    np.testing.assert_allclose(tiles(x), local(x), atol=1e-6)
    gradients = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (tiles, local)]
    np.testing.assert_allclose(*gradients, atol=1e-5)


def test_neighbouring_tiles_fade_linearly():
    x = jnp.arange(12.0)[None, None, :, None]

    def first(x):
        return jnp.full_like(x, x[0, 0, 0, 0])

    tiled = blend_tiles(first, x, tile=8, overlap=4, cells=(1, 1))
    fade = 4 * np.array([0.125, 0.375, 0.625, 0.875])  # from the first tile's 0 to the second's 4
    np.testing.assert_allclose(tiled.ravel(), [0] * 4 + fade.tolist() + [4] * 4, atol=1e-6)


def test_tiled_frames_are_near_the_whole_ones(params):
    """The difference: statistics, attention and zero padding are the tiles' own."""
    codec = KLCodec("toy", tile=24, overlap=12)
    z = latents(1, 36, 24, 4)
    whole, tiled = np.asarray(decode(CODEC, params, z)), np.asarray(decode(codec, params, z))
    assert whole.shape == tiled.shape == (1, 72, 48, 3)
    assert 0 < np.std(tiled - whole) < 0.1 * np.std(whole)
    encoded = jax.eval_shape(codec.encode, params, jax.ShapeDtypeStruct(whole.shape, jnp.float32))
    assert encoded.shape == z.shape
    small = latents(2, 8, 8, 4)
    np.testing.assert_array_equal(decode(codec, params, small), decode(CODEC, params, small))


def test_chunks_and_tiles_bound_the_memory():
    def megabytes(**fields):
        codec = KLCodec("toy", **fields)
        params = jax.eval_shape(codec.init, jax.random.key(0))
        z = jax.ShapeDtypeStruct((8, 64, 64, 4), jnp.float32)
        analysis = decode.lower(codec, params, z).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 2**20

    chunked = megabytes(chunk=1)
    assert chunked < 0.2 * megabytes(chunk=0)
    assert chunked < 8  # the scores of a whole frame alone would be 64
    assert megabytes(chunk=1, tile=16, overlap=4) < 0.3 * chunked


def test_gradients_of_chunks_are_those_of_the_whole_in_less_memory(params):
    z = latents(6, 8, 8, 4)

    def gradient(codec):
        loss = jax.grad(lambda z: jnp.square(codec.decode(params, z)).sum())
        compiled = jax.jit(loss).lower(z).compile()
        return compiled(z), compiled.memory_analysis().temp_size_in_bytes

    (wanted, memory), (value, less) = (
        gradient(KLCodec("toy", chunk=0)),
        gradient(KLCodec("toy", chunk=1)),
    )
    np.testing.assert_allclose(value, wanted, atol=1e-4 * np.abs(wanted).max())
    assert less < 0.3 * memory


def test_it_is_built_by_name_and_takes_what_the_data_has(params):
    codec = registry.build("codec", {"name": "kl", "variant": "toy", "chunk": 2})
    assert isinstance(codec, Codec) and hash(codec) == hash(KLCodec("toy", chunk=2))
    rgba = jax.ShapeDtypeStruct((3, 2, 16, 8, 4), jnp.float32)
    encoded = jax.eval_shape(codec.encode, params, rgba)
    assert encoded.shape == (3, 2, 8, 4, 4)
    assert jax.eval_shape(codec.decode, params, encoded).shape == (3, 2, 16, 8, 3)


def test_what_does_not_fit_is_named(params):
    with pytest.raises(ValueError, match="31 x 16 do not split into latent cells of 2 x 2"):
        encode(CODEC, params, images(31, 16, 3))
    with pytest.raises(ValueError, match="31 x 16 do not split into cells of 2 x 2 pixels"):
        KLCodec("toy", tile=4, overlap=1).encode(params, images(31, 16, 3))
    with pytest.raises(ValueError, match="0 or more, not -1 and 0"):
        KLCodec("toy", chunk=-1)
    with pytest.raises(ValueError, match="takes 3 channels; the images have 5"):
        encode(CODEC, params, images(16, 16, 5))
    with pytest.raises(ValueError, match="takes 4 channels, not 3"):
        decode(CODEC, params, latents(2, 2, 3))
    with pytest.raises(ValueError, match="no parameters of its own"):
        encode(CODEC, {}, images(16, 16, 3))
    with pytest.raises(ValueError, match="Unknown autoencoder 'huge'; known: sd, tiny"):
        registry.build("codec", {"name": "kl", "variant": "huge"})
    with pytest.raises(ValueError, match="Tiles of 8 latent cells cannot overlap by 8"):
        KLCodec(tile=8, overlap=8)
