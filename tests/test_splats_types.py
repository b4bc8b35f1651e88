"""gaussians.types: what a set of splats accepts, and how it behaves as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.types import Splats


def make(n: int = 5, coefficients: int = 4) -> Splats:
    return Splats(
        means=jnp.ones((n, 3)),
        log_scales=jnp.zeros((n, 3)),
        quaternions=jnp.ones((n, 4)),
        opacity_logits=jnp.zeros((n,)),
        sh=jnp.zeros((n, coefficients, 3)),
        active=jnp.ones((n,), bool),
    )


def test_length_and_degree():
    assert len(make(5)) == 5
    assert [make(2, k).sh_degree for k in (1, 4, 9, 16)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("log_scales", jnp.zeros((4, 3)), r"log_scales has shape \(4, 3\).*\(5, 3\)"),
        ("sh", jnp.zeros((5, 5, 3)), "5 spherical-harmonic coefficients"),
    ],
)
def test_wrong_shapes_are_named(field, value, message):
    leaves, structure = jax.tree.flatten(make())
    leaves[list(make().parameters).index(field)] = value
    wrong = jax.tree.unflatten(structure, leaves)
    with pytest.raises(ValueError, match=message):
        wrong.__post_init__()  # the constructor itself is guarded by the tests' shape checker


def test_parameters_round_trip_and_unknown_name():
    splats = make()
    moved = splats.with_parameters({"means": splats.means + 1.0})
    np.testing.assert_array_equal(moved.means, 2.0)
    assert moved.active is splats.active
    with pytest.raises(ValueError, match="no parameters \\['colour'\\]"):
        splats.with_parameters({"colour": splats.means})


def test_is_a_pytree_under_transformations():
    splats = make()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(splats)]
    assert names == [
        ".means",
        ".log_scales",
        ".quaternions",
        ".opacity_logits",
        ".sh",
        ".active",
    ]
    assert jax.tree.map(lambda _: None, splats).means is None
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), splats)
    assert batch.sh_degree == 1 and len(batch) == 5
    sums = jax.jit(jax.vmap(lambda s: s.means.sum()))(batch)
    np.testing.assert_allclose(sums, [15.0, 15.0])
    gradient = jax.grad(lambda p: splats.with_parameters(p).means.sum())(splats.parameters)
    np.testing.assert_array_equal(gradient["means"], 1.0)


def test_from_points():
    points = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    colours = np.array([[0.2, 0.5, 0.9], [1.0, 0.0, 0.5]], np.float32)
    splats = Splats.from_points(
        points,
        colours,
        scale=np.array([0.1, 0.2], np.float32),
        opacity=0.3,
        capacity=4,
        sh_degree=2,
    )
    assert len(splats) == 4 and splats.sh_degree == 2
    np.testing.assert_array_equal(splats.active, [True, True, False, False])
    np.testing.assert_array_equal(splats.means[:2], points)
    np.testing.assert_allclose(jnp.exp(splats.log_scales[:2, 1]), [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(splats.opacity_logits[:2]), 0.3, rtol=1e-6)
    np.testing.assert_allclose(splats.sh[:2, 0] * 0.28209479 + 0.5, colours, atol=1e-6)
    np.testing.assert_array_equal(splats.sh[:, 1:], 0.0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"capacity": 1}, "2 points do not fit a capacity of 1"),
        ({"opacity": 1.0}, "opacity 1.0 is outside"),
        ({"scale": 0.0}, "scale must be above 0"),
    ],
)
def test_from_points_rejects(keywords, message):
    points = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        Splats.from_points(points, points, **{"scale": 0.1, **keywords})
