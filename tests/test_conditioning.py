"""Conditioning: dropping, changing and joining conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models.conditioning import Conditioning


def example(batch=2, **extra):
    return Conditioning(
        image=jnp.ones((batch, 4, 4, 3)), camera=jnp.ones((batch, 5, 4, 4)), **extra
    )


def test_without_prompt_drops_prompt_and_motion_and_keeps_the_camera():
    dropped = example(motion=jnp.ones((2,))).without_prompt()
    assert dropped.drop_text.all() and dropped.drop_image.all() and dropped.drop_motion.all()
    assert dropped.drop_static is None and example().without_prompt(static=True).drop_static.all()
    np.testing.assert_array_equal(dropped.camera, example().camera)
    assert Conditioning().without_prompt() == Conditioning()


def test_without_prompt_keeps_what_is_dropped_by_mask_and_the_static_asset():
    """The network reads the masks; what they drop stays, for other branches of guidance."""
    given = {"image_embedding": jnp.ones((2, 6)), "static": jnp.ones((2, 5, 4, 4, 3))}
    dropped = example(**given).without_prompt()
    for name, value in given.items():
        np.testing.assert_array_equal(getattr(dropped, name), value)


def test_with_motion_takes_one_number_or_one_for_each_clip():
    dropped = example().without_prompt()
    np.testing.assert_array_equal(dropped.with_motion(3).motion, [3.0, 3.0])
    assert dropped.with_motion(3).drop_motion is None
    np.testing.assert_array_equal(example().with_motion(jnp.array([1.0, 2])).motion, [1.0, 2.0])


def test_concatenate_fills_masks_and_motion_that_are_absent():
    motion = jnp.array([4.0, 5.0])
    moving, still = example(motion=motion), example(1)
    joined = Conditioning.concatenate([moving, still, moving.without_prompt()])
    assert joined.batch_size == 5 and joined.camera.shape == (5, 5, 4, 4)
    np.testing.assert_array_equal(joined.motion, [4, 5, 0, 4, 5])
    np.testing.assert_array_equal(joined.drop_motion, [False, False, True, True, True])
    np.testing.assert_array_equal(joined.drop_text, [False, False, False, True, True])
    assert joined.context is None


def test_a_condition_that_only_some_have_is_refused():
    with pytest.raises(ValueError, match=r"Only some of the .* 'context'"):
        Conditioning.concatenate([example(), example(context=jnp.ones((2, 7, 8)))])


def test_concatenate_joins_every_field_in_order():
    first, second = (
        example(
            image_embedding=jnp.full((2, 6), n),
            static=jnp.full((2, 5, 4, 4, 3), n),
            context=jnp.full((2, 7, 8), n),
            null_context=jnp.full((2, 7, 8), -n),
        )
        for n in (1.0, 2.0)
    )
    joined = Conditioning.concatenate([first, second])
    for name in ("image_embedding", "static", "context"):
        values = getattr(joined, name).reshape(4, -1)
        np.testing.assert_array_equal(values[:, 0], [1, 1, 2, 2])
        assert (values == values[:, :1]).all()
    assert joined.null_context[3, 0, 0] == -2.0


def test_sizes_that_do_not_join_are_named():
    parts = [Conditioning(static=jnp.ones((2, n, 4, 4, 3))) for n in (5, 6)]
    with pytest.raises(ValueError, match=r"'static' of different sizes: \(5, 4.*\) and \(6, 4"):
        Conditioning.concatenate(parts)


def test_an_empty_conditioning_has_no_batch_size():
    with pytest.raises(ValueError, match="no batch size"):
        Conditioning().batch_size  # noqa: B018


def test_passes_through_transformations():
    conditioning = example(motion=jnp.arange(2.0))
    motions = jax.jit(jax.vmap(lambda m: conditioning.with_motion(m).motion))(jnp.arange(3.0))
    assert motions.shape == (3, 2)
    assert jax.tree.map(lambda leaf: None, conditioning).image is None
