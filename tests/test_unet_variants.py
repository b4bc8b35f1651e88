"""The networks of the paper's size, what was added to them, and how they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models import layers
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.image_conditioning import ImageTokens, adaptive_average
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS, expand

REDUCED = {
    "width": 16,
    "multipliers": (1, 2),
    "attention_levels": (0,),
    "blocks": 1,
    "head_dim": 8,
    "init_heads": 2,
    "init_head_dim": 8,
    "context_dim": 12,
    "groups": 4,
    "dropout": 0.0,
}
I2V = VARIANTS["diffusion4d_i2v"] | REDUCED


def conditions(b=2, t=3, h=4, w=4, width=12, **changes):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    given = {
        "context": normal(b, 5, width),
        "camera": normal(b, t, 4, 4),
        "image": normal(b, h, w, 4),
        "image_embedding": normal(b, width),
        "motion": jnp.linspace(3.0, 9.0, b),
    }
    return Conditioning(**given | changes)


def inputs_of(conditioning, h=4, w=4):
    b, t = conditioning.camera.shape[:2]
    x = np.random.default_rng(0).normal(size=(b, t, h, w, 4))
    return jnp.asarray(x, jnp.float32), jnp.full((b,), 321), conditioning


def shapes_of(fields, inputs):
    model = SpatioTemporalUNet(**fields)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def randomised(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def i2v():
    inputs = inputs_of(conditions())
    return randomised(shapes_of(I2V, inputs)), inputs


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def run(fields, params, inputs):
    return compiled(SpatioTemporalUNet(**fields))({"params": params}, *inputs)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("videomv_t2v", 1_412_895_300),
        ("videomv_i2v", 1_422_130_664),
        # The motion MLP: 1 -> 1280 -> 1280, and the null embedding.
        ("diffusion4d_t2v", 1_412_895_300 + 1280 + 1280 + 1280**2 + 1280 + 1280),
        ("diffusion4d_i2v", 1_422_130_664 + 1280 + 1280 + 1280**2 + 1280 + 1280),
    ],
)
def test_published_sizes(variant, published):
    shapes = shapes_of(expand({"variant": variant}), inputs_of(conditions(1, 2, 8, 8, 1024), 8, 8))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


def test_a_configuration_may_change_a_variant():
    fields = expand({"variant": "small", "multipliers": [1, 2], "dropout": 0.0})
    assert fields == VARIANTS["small"] | {"multipliers": (1, 2), "dropout": 0.0}
    with pytest.raises(ValueError, match="Unknown network variant 'huge'; known: tiny, small"):
        expand({"variant": "huge"})


@pytest.mark.parametrize("name", ["context", "image", "image_embedding", "camera", "motion"])
def test_every_condition_has_an_effect(i2v, name):
    params, (x, t, conditioning) = i2v
    changed = dataclasses.replace(conditioning, **{name: getattr(conditioning, name) + 1.0})
    difference = run(I2V, params, (x, t, changed)) - run(I2V, params, (x, t, conditioning))
    assert jnp.abs(difference).max() > 1e-3


def test_the_unconditional_branch_keeps_the_image_and_drops_its_embedding(i2v):
    """As VideoMV has it: negative text, a zero embedding, the same latent and cameras."""
    params, (x, t, conditioning) = i2v
    null = conditioning.context[::-1]
    dropped = dataclasses.replace(conditioning, null_context=null).without_prompt()
    spelt = dataclasses.replace(
        dropped,
        context=null,
        image_embedding=jnp.zeros_like(conditioning.image_embedding),
        drop_text=jnp.zeros((2,), bool),
        drop_image=jnp.zeros((2,), bool),
    )
    found, expected = (run(I2V, params, (x, t, c)) for c in (dropped, spelt))
    np.testing.assert_allclose(found, expected, atol=1e-5)


#: With REDUCED every kind of layer once: one level, and transformers in the middle alone.
LEAN = {"multipliers": (1,), "attention_levels": (), "init_heads": 0}


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_additions_leave_a_loaded_network_as_it_is(variant):
    """Motion, and a static asset as four more channels: nothing changes before they are trained."""
    base = VARIANTS[f"videomv_{variant}"] | REDUCED | LEAN
    grown = VARIANTS[f"diffusion4d_{variant}"] | REDUCED | LEAN | {"static_channels": 4}
    static = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4, 4, 4)), jnp.float32)
    inputs = inputs_of(conditions(static=static))
    loaded = randomised(shapes_of(base, inputs))
    key = jax.random.key(0, impl="rbg")  # compiles faster
    start = jax.jit(SpatioTemporalUNet(**grown).init)(key, *inputs)["params"]
    assert set(start) - set(loaded) == {"motion_embedding", "static_in"}
    assert start["static_in"]["kernel"].shape == (3, 3, 4, 16)
    expected = run(base, loaded, inputs)
    np.testing.assert_allclose(run(grown, start | loaded, inputs), expected, atol=1e-6)
    for name in ("motion_embedding", "static_in"):
        trained = start | loaded | {name: randomised(start[name])}
        assert jnp.abs(run(grown, trained, inputs) - expected).max() > 1e-3


def test_rematerialisation_keeps_less_for_the_backward_pass():
    """That gradients stay the same is tested on one level."""
    inputs = inputs_of(conditions())
    fields = VARIANTS["diffusion4d_i2v"] | REDUCED | LEAN
    params = randomised(shapes_of(fields, inputs))

    def kept(remat):
        model = SpatioTemporalUNet(**fields | {"remat": remat})

        def backward(params):
            return jax.vjp(lambda p: model.apply({"params": p}, *inputs), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))

    assert kept("blocks") < kept("dots") < 0.6 * kept("none")


def test_half_precision_is_close_and_parameters_stay_whole(i2v):
    params, inputs = i2v
    expected = run(I2V, params, inputs)
    half = I2V | {"dtype": jnp.bfloat16}
    found = run(half, params, inputs)
    assert found.dtype == jnp.float32
    assert (found != found.astype(jnp.bfloat16).astype(jnp.float32)).any()  # not rounded again
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half, inputs))} == {
        jnp.dtype("float32")
    }
    error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (40, 56), (5, 64)])
def test_adaptive_average_covers_the_image_as_torch_does(size):
    """Each box by its definition; parity with torch's own is part of the networks' parity."""
    h, w = size
    x = np.random.default_rng(0).normal(size=(1, h, w, 2)).astype(np.float32)
    found = adaptive_average(jnp.asarray(x), 32)
    for i, j in [(0, 0), (5, 17), (31, 31)]:
        rows = slice(i * h // 32, -(-(i + 1) * h // 32))
        columns = slice(j * w // 32, -(-(j + 1) * w // 32))
        np.testing.assert_allclose(found[0, i, j], x[0, rows, columns].mean((0, 1)), atol=1e-5)


def test_an_image_makes_sixty_four_tokens_whatever_its_size():
    module = ImageTokens(5)
    for size in ((8, 8), (32, 32), (32, 64)):
        image = jnp.ones((2, *size, 4))
        tokens, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
        assert tokens.shape == (2, 64, 5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context": jnp.zeros((2, 5, 7))}, r"a context \(2, any, 12\); got \(2, 5, 7\)"),
        ({"image_embedding": None}, r"image's embedding \(2, 12\); got none"),
        ({"image_embedding": jnp.zeros((2, 9))}, r"embedding \(2, 12\); got \(2, 9\)"),
        ({"static": None}, r"static asset \(2, 3, 4, 4, 4\); got none"),
    ],
)
def test_conditions_that_do_not_fit_are_named(changes, sentence):
    given = {"static": jnp.zeros((2, 3, 4, 4, 4))} | changes
    with pytest.raises(ValueError, match=sentence):
        shapes_of(I2V | {"static_channels": 4}, inputs_of(conditions(**given)))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("motion", (1,), r"a 'motion' for each clip \(2\); got \(1,\)"),
        ("drop_text", (1,), r"a 'drop_text' for each clip \(2\); got \(1,\)"),
        ("drop_motion", (3,), r"a 'drop_motion' for each clip \(2\); got \(3,\)"),
        ("null_context", (2, 6, 12), r"a null context \(2, 5, 12\); got \(2, 6, 12\)"),
        ("null_context", (1, 5, 12), r"a null context \(2, 5, 12\); got \(1, 5, 12\)"),
    ],
)
def test_conditions_of_other_batches_are_named(name, shape, sentence):
    x, t, conditioning = inputs_of(conditions())
    value = jnp.zeros(shape, bool if name.startswith("drop") else jnp.float32)
    object.__setattr__(conditioning, name, value)  # past these tests' check of annotations
    with pytest.raises(ValueError, match=f"needs {sentence}"):
        shapes_of(I2V, (x, t, conditioning))


def test_latents_and_timesteps_of_other_ranks_are_named():
    x, t, conditioning = inputs_of(conditions())
    check = SpatioTemporalUNet(**I2V)._check
    with pytest.raises(ValueError, match=r"frames, .* have the shape \(3, 4, 4, 4\)"):
        check(x[0], t, conditioning)
    with pytest.raises(ValueError, match=r"needs timesteps \(2,\), one for each clip; got \(\)"):
        check(x, t[0], conditioning)


def test_unknown_ways_of_computing_are_named():
    with pytest.raises(ValueError, match=r"remat is one of .* not 'some'"):
        shapes_of(I2V | {"remat": "some"}, inputs_of(conditions()))
    with pytest.raises(ValueError, match=r"attention is one of .* not 'flash'"):
        shapes_of(I2V | {"attention": "flash"}, inputs_of(conditions()))


def test_attention_has_the_named_implementation_in_every_transformer(monkeypatch):
    seen, attend = [], layers.attend

    def record(query, key, value, implementation):
        seen.append(implementation)
        return attend(query, key, value, implementation)

    monkeypatch.setattr(layers, "attend", record)
    shapes_of(I2V | {"attention": "chunked"}, inputs_of(conditions()))
    # The first mixer; both transformers of down_0, mid and twice of up_0; two attentions each.
    # That of the concatenated image looks at a few frames of four channels.
    assert sorted(seen) == ["chunked"] * 2 * (1 + 2 * 4) + ["xla"]
