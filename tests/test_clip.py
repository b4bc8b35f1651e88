"""CLIP's towers: sizes, what a token sees, activations, and the preparation of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from d4d_jax.models.clip import (
    MLP,
    PIXEL_MEAN,
    PIXEL_STD,
    VARIANTS,
    ImageEncoder,
    TextEncoder,
    preprocess_image,
)

TEXT = VARIANTS["tiny"]["text"]
IMAGE = VARIANTS["tiny"]["image"]


def randomised(model, inputs, **options):
    """Variables without any zero of the initialisation."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, **options))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)

    def draw(shape):
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        return jnp.asarray(values if len(shape) > 1 else 0.5 + 0.2 * values, jnp.float32)

    return jax.tree.unflatten(tree, [draw(leaf.shape) for leaf in leaves])


def count(model, *inputs, **options):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.fixture(scope="module")
def tokens():
    ids = np.random.default_rng(0).integers(0, 1000, (2, 12))
    ids[0, 7], ids[1, 11] = 1023, 1023
    return ids


@pytest.fixture(scope="module")
def text(tokens):
    """The tiny text tower, jitted, and its variables."""
    model = TextEncoder(**TEXT)
    return jax.jit(model.apply), randomised(model, tokens)


def test_parameters_of_vit_h_14():
    """The text tower without its last block and its projection, the image tower with its own."""
    ids, pixels = jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 224, 224, 3))
    fields = VARIANTS["vit_h_14"]
    assert count(TextEncoder(**fields["text"]), ids) == 340_387_840
    assert count(ImageEncoder(**fields["image"]), pixels) == 632_076_800
    whole = TextEncoder(**fields["text"] | {"skip_last": 0, "projection": 1024})
    assert count(whole, ids, pooled=True) == 340_387_840 + 12_596_224 + 1024 * 1024
    output = jax.eval_shape(lambda: whole.init_with_output(jax.random.key(0), ids)[0])
    assert output.shape == (1, 77, 1024)


def test_parameters_of_vit_l_14():
    """Stable Diffusion 1's text tower is said to have 123,060,480 parameters."""
    ids, pixels = jnp.zeros((1, 77), jnp.int32), jnp.zeros((1, 224, 224, 3))
    fields = VARIANTS["vit_l_14"]
    assert count(TextEncoder(**fields["text"]), ids) == 123_060_480
    assert count(ImageEncoder(**fields["image"]), pixels) == 303_966_208


def test_every_normalisation_has_the_epsilon_of_the_reference():
    seen = []

    def spy(run, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            seen.append(context.module.epsilon)
        return run(*args, **kwargs)

    with nn.intercept_methods(spy):
        count(TextEncoder(**TEXT), jnp.zeros((1, 5), jnp.int32))
        count(ImageEncoder(**IMAGE), jnp.zeros((1, 64, 64, 3)))
    assert len(seen) == (2 * 2 + 1) + (2 * 2 + 2) and set(seen) == {1e-5}


def test_a_token_sees_itself_and_those_before_it(text, tokens):
    apply, variables = text
    changed = tokens.copy()
    changed[:, 5] = 17
    moved = np.abs(apply(variables, changed) - apply(variables, tokens)).max((0, 2))
    assert (moved[:5] == 0).all() and (moved[5:] > 1e-3).all()


def test_padding_is_part_of_the_context(text, tokens):
    """No padding mask: what stands behind the end of the text is encoded as it is."""
    apply, variables = text
    zeros, ends = tokens.copy(), tokens.copy()
    zeros[0, 8:], ends[0, 8:] = 0, 1023
    output, other = apply(variables, zeros)[0], apply(variables, ends)[0]
    np.testing.assert_array_equal(output[:8], other[:8])
    assert (np.abs(output[8:] - other[8:]).max(-1) > 1e-3).all()


def test_a_text_may_be_shorter_than_the_positions(text, tokens):
    apply, variables = text
    short = apply(variables, tokens[:, :9])
    np.testing.assert_allclose(short, apply(variables, tokens)[:, :9], atol=1e-5)


def test_the_pooled_state_is_that_of_the_end_of_the_text(tokens):
    model = TextEncoder(**TEXT, projection=8)
    variables = randomised(model, tokens, pooled=True)
    apply = jax.jit(model.apply, static_argnames="pooled")
    pooled, states = apply(variables, tokens, pooled=True), apply(variables, tokens)
    ends = jnp.stack([states[0, 7], states[1, 11]])
    wanted = ends @ variables["params"]["projection"]["kernel"]
    np.testing.assert_allclose(pooled, wanted, atol=1e-5)


def test_activations_differ_and_gelu_is_exact():
    x = jnp.linspace(-4, 4, 33).reshape(1, 1, 33)

    def hidden(activation):
        """The activation alone: identity matrices around it."""
        layer = {"kernel": jnp.eye(33), "bias": jnp.zeros(33)}
        params = {"linear_1": layer, "linear_2": layer}
        return MLP(33, activation, jnp.float32).apply({"params": params}, x)

    exact = 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2)))
    np.testing.assert_allclose(hidden("gelu"), exact, atol=1e-6)
    assert np.abs(nn.gelu(x) - exact).max() > 1e-4  # the approximation that would pass unseen
    np.testing.assert_allclose(hidden("quick_gelu"), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_half_precision_stays_near(text, tokens):
    apply, variables = text
    half = jax.jit(TextEncoder(**TEXT, dtype=jnp.bfloat16).apply)(variables, tokens)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, apply(variables, tokens), atol=0.15)
    pixels = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype(np.float32)
    image = ImageEncoder(**IMAGE)
    variables = randomised(image, pixels)
    wanted = jax.jit(image.apply)(variables, pixels)
    half = jax.jit(ImageEncoder(**IMAGE, dtype=jnp.bfloat16).apply)(variables, pixels)
    assert half.dtype == jnp.float32 and wanted.std() > 0.1
    np.testing.assert_allclose(half, wanted, atol=0.15)


def test_an_image_patch_is_seen_where_it_lies():
    model = ImageEncoder(**IMAGE)
    pixels = np.random.default_rng(2).normal(size=(1, 64, 64, 3)).astype(np.float32)
    variables = randomised(model, pixels)
    swapped = pixels.copy()
    swapped[:, :16], swapped[:, 16:32] = pixels[:, 16:32], pixels[:, :16]
    apply = jax.jit(model.apply)
    assert np.abs(apply(variables, swapped) - apply(variables, pixels)).max() > 1e-3


@pytest.mark.parametrize(
    ("method", "resample"), [("linear", Image.Resampling.BILINEAR), ("cubic", Image.BICUBIC)]
)
@pytest.mark.parametrize("size", [(300, 300), (100, 100), (256, 331), (290, 240)])
def test_preprocessing_is_pillows_without_its_rounding(method, resample, size):
    frame = np.random.default_rng(3).uniform(0, 1, (*size, 3)).astype(np.float32)
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = frame[top : top + side, left : left + side]
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(square[..., c])).resize((224, 224), resample)
        )
        for c in range(3)
    ]
    wanted = (np.stack(channels, -1) - PIXEL_MEAN) / PIXEL_STD
    np.testing.assert_allclose(preprocess_image(frame, method=method), wanted, atol=2e-4)


def test_preprocessing_of_a_clip_and_without_antialiasing():
    frames = np.random.default_rng(4).uniform(0, 1, (2, 3, 96, 64, 3)).astype(np.float32)
    smooth = preprocess_image(frames, 32)
    assert smooth.shape == (2, 3, 32, 32, 3)
    np.testing.assert_allclose(smooth[1, 2], preprocess_image(frames[1, 2], 32), atol=1e-5)
    assert np.std(preprocess_image(frames, 32, antialias=False)) > 1.2 * np.std(smooth)
    white = preprocess_image(np.ones((8, 8, 3), np.float32), 4)
    np.testing.assert_allclose(white[0, 0], (1 - np.array(PIXEL_MEAN)) / PIXEL_STD, atol=1e-6)


def test_what_does_not_fit_is_named(tokens):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="takes 8 tokens at most, not 12"):
        TextEncoder(**TEXT, positions=8).init(key, tokens)
    with pytest.raises(ValueError, match="has no projection"):
        TextEncoder(**TEXT).init(key, tokens, pooled=True)
    with pytest.raises(ValueError, match="64 x 64 x 3, not 32 x 64 x 3"):
        ImageEncoder(**IMAGE).init(key, jnp.zeros((1, 32, 64, 3)))
    with pytest.raises(ValueError, match="64 channels do not split into 5 heads"):
        TextEncoder(**TEXT | {"heads": 5}).init(key, tokens)
    with pytest.raises(ValueError, match="not 'relu'"):
        TextEncoder(**TEXT, activation="relu").init(key, tokens)
    with pytest.raises(ValueError, match="3 channels, not 4; composite"):
        preprocess_image(np.zeros((8, 8, 4), np.float32))
    with pytest.raises(ValueError, match="leave out 3 of 3 blocks"):
        TextEncoder(**TEXT | {"skip_last": 3}).init(key, tokens)


def test_an_unknown_token_gives_nan(text, tokens):
    apply, variables = text
    unknown = tokens.copy()
    unknown[0, 6] = 1024
    output = apply(variables, unknown)
    assert np.isnan(output[0, 6:]).all() and not np.isnan(output[1]).any()
