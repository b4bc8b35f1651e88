"""One resolution of the network: rematerialisation, skips and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models.level import REMATS, Blocks, Level

CHANNELS = 8


def level(remat="none", attends=(True,), **changes):
    blocks = Blocks("attention", 4, 0.3, "auto", remat, jnp.dtype(jnp.float32))
    fields = {"resample": "down", "head_dim": 4, "temporal_conv": True, "blocks": blocks}
    return Level(CHANNELS, attends, **fields | changes)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, EMBEDDING, CONTEXT = normal(1, 3, 4, 4, 4), normal(1, 3, 10, seed=1), normal(1, 5, 12, seed=2)


def shapes_of(module, *skips):
    def init():
        given = (X, EMBEDDING, skips)
        return module.init_with_output(jax.random.key(0), *given, context=CONTEXT, train=False)

    return jax.eval_shape(init)


def randomised(module):
    _, variables = shapes_of(module)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), variables)


def loss_of(remat):
    rngs = {"dropout": jax.random.key(3)}

    def loss(variables, x):
        apply = level(remat).apply
        y, _ = apply(variables, x, EMBEDDING, context=CONTEXT, train=True, rngs=rngs)
        return jnp.sum(y**2)

    return loss


def kept(remat):
    """Numbers that the forward pass keeps for the backward pass."""

    def backward(variables, x):
        return jax.vjp(loss_of(remat), variables, x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, randomised(level()), X))
    return sum(leaf.size for leaf in leaves)


def test_rematerialisation_keeps_less():
    assert kept("blocks") < kept("dots") < 0.8 * kept("none")


@pytest.fixture(scope="module")
def plain():
    variables = randomised(level())
    return variables, jax.jit(jax.grad(loss_of("none"), argnums=(0, 1)))(variables, X)


@pytest.mark.parametrize("remat", sorted(set(REMATS) - {"none"}))
def test_rematerialisation_gives_the_same_gradients(plain, remat):
    """With dropout, whose mask must be the same when a block is computed again.

    To 2e-5: gradients of the biases before a normalisation are sums of terms that cancel.
    """
    variables, expected = plain
    assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.abs(g).max() > 0), expected))
    found = jax.jit(jax.grad(loss_of(remat), argnums=(0, 1)))(variables, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())),
        found,
        expected,
    )


def test_outputs_of_every_part_are_the_skips_of_the_way_up():
    (y, outputs), variables = shapes_of(level(attends=(True, False)))
    assert y.shape == (1, 3, 2, 2, CHANNELS)
    assert [skip.shape[2] for skip in outputs] == [4, 4, 2]
    assert {"spatial_0", "temporal_0"} <= set(variables["params"])
    assert not {"spatial_1", "temporal_1"} & set(variables["params"])


def test_skips_come_behind_the_input():
    (y, _), variables = shapes_of(level(resample="up"), normal(1, 3, 4, 4, 8))
    assert y.shape == (1, 3, 8, 8, CHANNELS)
    assert variables["params"]["residual_0"]["conv_in"]["kernel"].shape == (3, 3, 12, CHANNELS)


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="8 channels do not split into heads of 3"):
        shapes_of(level(head_dim=3))
