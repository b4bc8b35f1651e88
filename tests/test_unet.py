"""The network against an independent implementation, and what its parts may and may not see."""

import functools
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError
from golden import make_unet_golden as golden

from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.embeddings import EmbeddingMLP, MotionEmbedding
from d4d_jax.models.temporal import NoMixer
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS

FRAMES = 3

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (),
    "head_dim": 8,
    "init_heads": 1,
    "init_head_dim": 8,
    "context_dim": 6,
    "groups": 2,
    "image_concat": "all",
    "image_tokens": True,
    "dropout": 0.0,
}
#: One level and nothing that looks across frames.
FRAMEWISE = SMALL | {
    "multipliers": (1,),
    "temporal_mixer": "none",
    "temporal_conv": False,
    "context_dim": 0,
    "image_tokens": False,
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def example(fields, batch=2, frames=FRAMES, size=4):
    """Noisy latents, timesteps and a full conditioning for a network with these fields."""
    channels = fields["in_channels"]
    image = None if fields["image_concat"] == "none" else normal(1, batch, size, size, channels)
    kept = jnp.zeros((batch,), bool)
    conditioning = Conditioning(
        image=image,
        camera=normal(2, batch, frames, 4, 4),
        motion=jnp.linspace(5.0, 15.0, batch),
        drop_image=kept,
        drop_motion=kept,
    )
    return normal(3, batch, frames, size, size, channels), jnp.full((batch,), 321), conditioning


def randomised(model, inputs, seed=0):
    """Parameters without the zero initialisation, which would hide most of the network."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(0.0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def count(params):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def shapes_of(fields, inputs):
    model = SpatioTemporalUNet(**fields)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


@pytest.fixture(scope="module")
def small():
    """A small network with every condition: its inputs, parameters and compiled `apply`."""
    model = SpatioTemporalUNet(**SMALL)
    inputs = example(SMALL)
    params = randomised(model, inputs)
    return inputs, params, jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


@pytest.mark.parity
def test_agrees_with_diffusers_on_random_weights():
    """Block structure, order, epsilons, activations and embeddings of the reference network."""
    data = np.load(pathlib.Path(golden.__file__).with_name("unet.npz"))
    model = SpatioTemporalUNet(**golden.FIELDS)
    names = ("context", "camera", "motion", "drop_motion")
    inputs = (data["x"], data["timestep"], Conditioning(**{name: data[name] for name in names}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: golden.draw_parameter("/".join(k.key for k in path), leaf.shape), shapes
    )
    output = jax.jit(model.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(output, data["output"], atol=2e-5)


def test_tiny_variant_is_tiny():
    fields = VARIANTS["tiny"]
    inputs = example(fields, batch=1, frames=24, size=8)
    assert 1e6 < count(shapes_of(fields, inputs)) < 1.9e6


def test_output_has_the_latents_shape_and_float32_whatever_the_compute_type():
    model = SpatioTemporalUNet(**SMALL, dtype=jnp.bfloat16)
    inputs = example(SMALL)
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    assert output.shape == inputs[0].shape and output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_samples_of_a_batch_do_not_mix(small):
    (x, t, conditioning), params, apply = small
    swapped = jax.tree.map(lambda leaf: leaf[::-1], (x, t, conditioning))
    output = apply(params, x, t, conditioning)
    np.testing.assert_allclose(apply(params, *swapped)[::-1], output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["image", "camera", "motion"])
def test_every_condition_has_an_effect(small, name):
    (x, t, conditioning), params, apply = small
    changed = replace(conditioning, **{name: getattr(conditioning, name) + 5.0})
    difference = apply(params, x, t, changed) - apply(params, x, t, conditioning)
    assert jnp.abs(difference).max() > 1e-3


def test_dropped_conditions_have_no_effect_and_only_for_the_masked_samples(small):
    (x, t, conditioning), params, apply = small
    masked = jnp.array([True, False])
    conditioning = replace(conditioning, drop_image=masked, drop_motion=masked)
    image, motion = conditioning.image + 1.0, conditioning.motion + 5.0
    one = apply(params, x, t, conditioning)
    other = apply(params, x, t, replace(conditioning, image=image, motion=motion))
    np.testing.assert_array_equal(one[0], other[0])
    assert jnp.abs(one[1] - other[1]).max() > 1e-3


def test_motion_and_camera_change_nothing_before_training(small):
    """A pretrained network that gets these embeddings added is unchanged at step 0."""
    (x, t, conditioning), params, apply = small
    start = {
        "motion_embedding": MotionEmbedding(32).init(jax.random.key(0), jnp.ones((2,))),
        "camera_embedding": EmbeddingMLP(32, True).init(jax.random.key(1), jnp.ones((2, 16))),
    }
    grown = params | {name: variables["params"] for name, variables in start.items()}
    moving = apply(grown, x, t, conditioning)
    camera, motion = conditioning.camera + 1.0, conditioning.motion * 3.0
    other = replace(conditioning, camera=camera, motion=motion)
    np.testing.assert_array_equal(moving, apply(grown, x, t, other))
    assert jnp.abs(moving).max() > 0.0


def test_missing_motion_is_the_null_motion():
    model, (x, t, conditioning) = SpatioTemporalUNet(**FRAMEWISE), example(FRAMEWISE)
    variables = {"params": randomised(model, (x, t, conditioning))}
    apply = jax.jit(model.apply)
    dropped = apply(variables, x, t, replace(conditioning, drop_motion=jnp.ones((2,), bool)))
    missing = apply(variables, x, t, replace(conditioning, motion=None, drop_motion=None))
    np.testing.assert_allclose(missing, dropped, rtol=1e-5, atol=1e-5)


def test_untrained_network_answers_zero():
    model, key = SpatioTemporalUNet(**FRAMEWISE), jax.random.key(0, impl="rbg")
    output, _ = jax.jit(model.init_with_output)(key, *example(FRAMEWISE))
    np.testing.assert_array_equal(output, jnp.zeros_like(output))


def permuted(inputs, order):
    x, t, conditioning = inputs
    return x[:, order], t, replace(conditioning, camera=conditioning.camera[:, order])


@pytest.mark.parametrize(
    ("mixer", "conv", "ordered"),
    [("none", False, False), ("attention", False, False), ("none", True, True)],
)
def test_frame_order_enters_only_through_the_temporal_convolutions(mixer, conv, ordered):
    fields = FRAMEWISE | {"temporal_mixer": mixer, "temporal_conv": conv, "image_concat": "none"}
    model, inputs, order = SpatioTemporalUNet(**fields), example(fields), np.array([2, 0, 1])
    params, apply = randomised(model, inputs), jax.jit(model.apply)
    output = apply({"params": params}, *inputs)
    shuffled = apply({"params": params}, *permuted(inputs, order))
    difference = jnp.abs(shuffled - output[:, order]).max() / jnp.abs(output).max()
    assert (difference > 1e-2) == ordered


@pytest.mark.parametrize(("concat", "touched"), [("first", [0]), ("all", [0, 1, 2])])
def test_reference_latent_joins_the_first_or_all_frames(concat, touched):
    fields = FRAMEWISE | {"image_concat": concat}
    model, (x, t, conditioning) = SpatioTemporalUNet(**fields), example(FRAMEWISE)
    params, apply = randomised(model, (x, t, conditioning)), jax.jit(model.apply)
    before = apply({"params": params}, x, t, conditioning)
    other = replace(conditioning, image=conditioning.image + 1.0)
    moved = jnp.abs(apply({"params": params}, x, t, other) - before).max((0, 2, 3, 4))
    assert np.flatnonzero(moved > 1e-4).tolist() == touched


def test_gradients_are_finite_and_reach_every_parameter():
    fields = SMALL | {"multipliers": (1,), "init_heads": 0}  # the middle has every kind of layer
    model, inputs = SpatioTemporalUNet(**fields), example(fields, batch=1, size=8)
    params = randomised(model, inputs)

    def loss(params, drop):
        x, t, conditioning = inputs
        conditioning = replace(conditioning, drop_motion=drop)
        return jnp.mean(jnp.square(model.apply({"params": params}, x, t, conditioning)))

    gradient = jax.jit(jax.grad(loss))
    kept, dropped = (gradient(params, jnp.array([flag])) for flag in (False, True))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(dropped), strict=True
    ):
        assert jnp.isfinite(one).all() and jnp.isfinite(other).all(), path
        assert jnp.abs(one).max() + jnp.abs(other).max() > 0.0, path


class DoublingMixer(NoMixer):
    """Somebody else's temporal mixer, named by the path of its class."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("gain", jax.nn.initializers.constant(2.0), ())


def test_mixer_can_be_named_from_outside_and_only_its_parameters_change():
    inputs = example(SMALL)

    def names(mixer):
        params = shapes_of(SMALL | {"temporal_mixer": mixer}, inputs)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        return set(paths)

    ours, theirs = names("attention"), names(f"{__name__}:DoublingMixer")
    assert "['mid']['temporal_0']['gain']" in theirs
    assert all("temporal" in name and "conv" not in name for name in ours ^ theirs)
    with pytest.raises(ValueError, match="Unknown temporal_mixer 'retention'"):
        names("retention")


def test_dropout_needs_its_random_stream_only_in_training():
    model, inputs = SpatioTemporalUNet(**(SMALL | {"dropout": 0.1})), example(SMALL)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    train = functools.partial(model.apply, train=True)
    jax.eval_shape(model.apply, variables, *inputs)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(functools.partial(train, rngs=rngs), variables, *inputs)
    with pytest.raises(InvalidRngError):
        jax.eval_shape(train, variables, *inputs)


BAD_INPUTS = {
    "cannot be halved": lambda x, c: (x[:, :, :3], c),
    "takes 3 channels; the latents have 2": lambda x, c: (x[..., :2], c),
    r"cameras \(2, 3, 4, 4\); got \(2, 2, 4, 4\)": lambda x, c: (
        x,
        replace(c, camera=c.camera[:, :2]),
    ),
    "cameras .* got none": lambda x, c: (x, replace(c, camera=None)),
    "reference latent .* got none": lambda x, c: (x, replace(c, image=None)),
    r"reference latent \(2, 4, 4, any\); got \(2, 2, 4, 3\)": lambda x, c: (
        x,
        replace(c, image=c.image[:, :2]),
    ),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_sizes_that_do_not_fit_are_named(message):
    x, t, conditioning = example(SMALL)
    x, conditioning = BAD_INPUTS[message](x, conditioning)
    with pytest.raises(ValueError, match=message):
        shapes_of(SMALL, (x, t, conditioning))


def test_a_network_of_tokens_says_that_it_got_none():
    fields = FRAMEWISE | {"context_dim": 6}
    with pytest.raises(ValueError, match="got none: pass"):
        shapes_of(fields, example(fields))


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="do not split into heads of 5"):
        shapes_of(SMALL | {"head_dim": 5}, example(SMALL))
    with pytest.raises(ValueError, match="need a context_dim above 0"):
        shapes_of(SMALL | {"context_dim": 0}, example(SMALL))
    with pytest.raises(ValueError, match="image_concat is one of"):
        shapes_of(SMALL | {"image_concat": "last"}, example(SMALL))
