import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.deformation.planes import PAIRS, lookup_line, lookup_plane, sample

CHANNELS = 3


def make_grids(resolutions=(4, 7), seed=0, dtype=np.float64):
    """Planes and lines of every scale, with signs and nothing near 0 or 1."""
    rng = np.random.default_rng(seed)
    planes = tuple(
        tuple(rng.normal(size=(r, r, CHANNELS)).astype(dtype) for _ in PAIRS) for r in resolutions
    )
    lines = tuple(
        tuple(rng.normal(size=(r, CHANNELS)).astype(dtype) for _ in range(3)) for r in resolutions
    )
    return planes, lines


def make_points(dtype=np.float64):
    """Inside of cells, twice in one place, exactly on nodes of either scale, and on the border."""
    rng = np.random.default_rng(1)
    special = [
        [0, 0, 0], [1, 1, 1], [0, 1, 0.3], [1, 0.25, 0], [0.5, 0.5, 0.5], [0.5, 2 / 6, 0.2],
        [0.7, 0.1, 0.9], [0.7, 0.1, 0.9],
    ]  # fmt: skip
    return np.concatenate([special, rng.random((12, 3))]).astype(dtype)


def by_definition(planes, lines, points):
    """One point, plane and corner after the other."""
    out = []
    for point in np.asarray(points, np.float64):
        features = []
        for squares, axes in zip(planes, lines, strict=True):
            product = np.ones(CHANNELS)
            for plane, (a, b) in zip(squares, PAIRS, strict=True):
                product *= np.einsum(
                    "i,j,ijc->c", *(hats(point[k], plane.shape[0]) for k in (a, b)), plane
                )
            for axis, line in enumerate(axes):
                product *= hats(point[axis], line.shape[0]) @ line
            features.append(product)
        out.append(np.concatenate(features))
    return np.stack(out)


def hats(at, nodes):
    return np.maximum(0, 1 - np.abs(at * (nodes - 1) - np.arange(nodes)))


def without_rule(planes, lines, at):
    """The same lookups, left to automatic differentiation."""
    scales = []
    for squares, axes in zip(planes, lines, strict=True):
        factors = [
            lookup_plane(p, at[:, list(pair)]) for p, pair in zip(squares, PAIRS, strict=True)
        ]
        factors += [lookup_line(line, at[:, axis]) for axis, line in enumerate(axes)]
        scales.append(functools.reduce(jnp.multiply, factors))
    return jnp.concatenate(scales, axis=-1)


def gradients(function, planes, lines, at, weights):
    def value(planes, lines, at):
        return jnp.sum(weights * function(planes, lines, at))

    return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(planes, lines, at)


@pytest.mark.parametrize("resolutions", [(2,), (4, 7), (3, 6, 12)])
def test_samples_are_products_of_interpolated_values(resolutions):
    planes, lines = make_grids(resolutions)
    points = make_points()
    with jax.enable_x64():
        features = jax.jit(sample)(planes, lines, points)
    np.testing.assert_allclose(features, by_definition(planes, lines, points), atol=1e-12)


@pytest.mark.parametrize("resolutions", [(2,), (3, 6)])
@pytest.mark.parametrize("slopes", [True, False])
def test_the_backward_pass_is_that_of_the_lookups(resolutions, slopes):
    points = make_points()
    weights = np.random.default_rng(2).normal(size=(len(points), CHANNELS * len(resolutions)))
    with jax.enable_x64():
        grids = jax.tree.map(jnp.asarray, make_grids(resolutions))
        got = gradients(
            lambda *inputs: sample(*inputs, slopes), *grids, jnp.asarray(points), weights
        )
        expected = gradients(without_rule, *grids, jnp.asarray(points), weights)
    if not slopes:
        assert not np.any(got[2])
        got, expected = got[:2], expected[:2]
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-11)


def test_gradients_of_nodes_agree_with_finite_differences():
    """The product is linear in each factor, so differences are of the plane or line at hand."""
    points = make_points()
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(len(points), 2 * CHANNELS))
    planes, lines = make_grids()

    def value(planes, lines):
        return np.sum(weights * by_definition(planes, lines, points))

    with jax.enable_x64():
        grids = jax.tree.map(jnp.asarray, (planes, lines))
        got = gradients(sample, *grids, jnp.asarray(points), weights)[:2]
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (planes, lines))
    ahead, behind = (
        value(*jax.tree.map(lambda x, d, s=s: x + s * d, (planes, lines), direction))
        for s in (1e-6, -1e-6)
    )
    slope = sum(
        np.vdot(g, d) for g, d in zip(jax.tree.leaves(got), jax.tree.leaves(direction), strict=True)
    )
    assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slopes_agree_with_differences_into_the_cell(axis):
    """On a node it is the cell after it that counts; on the last node the one before."""
    points = make_points()
    weights = np.random.default_rng(4).normal(size=(len(points), 2 * CHANNELS))
    planes, lines = make_grids()
    with jax.enable_x64():
        grids = jax.tree.map(jnp.asarray, (planes, lines))
        got = gradients(sample, *grids, jnp.asarray(points), weights)[2]
    step = np.where(points[:, axis] == 1, -1e-7, 1e-7)
    moved = points.copy()
    moved[:, axis] += step
    change = by_definition(planes, lines, moved) - by_definition(planes, lines, points)
    expected = np.sum(weights * change, axis=1) / step
    np.testing.assert_allclose(got[:, axis], expected, rtol=1e-4, atol=1e-4)


def test_several_timestamps_at_once():
    """vmap over the lines alone, as for several views of one step, and under jit."""
    planes, lines = jax.tree.map(jnp.asarray, make_grids(dtype=np.float32))
    others = jax.tree.map(jnp.asarray, make_grids(seed=8, dtype=np.float32)[1])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), lines, others)
    at = jnp.asarray(make_points(np.float32))
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(len(at), 6)), jnp.float32)

    def gradient(planes, lines, at):
        return gradients(sample, planes, lines, at, weights)

    got = jax.jit(jax.vmap(gradient, in_axes=(None, 0, None)))(planes, both, at)
    for i, one in enumerate((lines, others)):
        expected = gradient(planes, one, at)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-4)


def test_single_precision_stays_single():
    planes, lines = jax.tree.map(jnp.asarray, make_grids(dtype=np.float32))
    at = jnp.asarray(make_points(np.float32))
    features = sample(planes, lines, at)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, by_definition(planes, lines, at), atol=1e-5)
    leaves = jax.tree.leaves(gradients(sample, planes, lines, at, features))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
