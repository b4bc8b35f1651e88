import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.deformation import build
from gaussians.deformation.hexplane import HexPlane, lookup_plane, slice_at
from gaussians.types import Splats

SIZES = {"spatial_resolution": 5, "time_resolution": 4, "channels": 3, "width": 8}


def make_splats(count=20, seed=0, spread=0.7):
    rng = np.random.default_rng(seed)
    return Splats.from_points(
        rng.uniform(-spread, spread, (count, 3)), rng.random((count, 3)), scale=0.05
    )


def random_params(field, seed=1):
    """Parameters with nothing at rest, heads included."""
    leaves, structure = jax.tree.flatten(field.init(jax.random.key(0), make_splats()))
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(rng.uniform(0.3, 1.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


def positions_at(field, params, splats, times):
    return np.stack([np.asarray(field.apply(params, splats, float(t)).means) for t in times])


@pytest.mark.parametrize("opacity", [False, True])
def test_starts_as_the_identity(opacity):
    field, splats = HexPlane(**SIZES, opacity=opacity), make_splats()
    params = field.init(jax.random.key(3), splats)
    for t in (0.0, 0.37, 1.0):
        moved = field.apply(params, splats, t)
        for old, new in zip(jax.tree.leaves(splats), jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(old, new)


def test_the_whole_time_plane_is_used():
    """Every node of a time plane, first and last included, moves the splats at its own instant."""
    field, splats = HexPlane(**SIZES), make_splats()
    params = random_params(field)
    times = np.linspace(0, 1, field.time_resolution)
    before = positions_at(field, params, splats, times)
    for node in range(field.time_resolution):
        changed = jax.tree.map(lambda leaf: leaf, params)
        changed["planes"][0]["xt"] = changed["planes"][0]["xt"].at[node].add(0.5)
        moved = np.abs(positions_at(field, changed, splats, times) - before).max(axis=(1, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(field.time_resolution) == node)


def test_collapsed_time_planes_equal_full_bilinear_lookups():
    """The line at t, looked up at x, is the plane looked up at (x, t)."""
    field, splats = HexPlane(**SIZES, multires=(1, 2)), make_splats()
    params, t = random_params(field), 0.41
    unit = (splats.means + field.bound) / (2 * field.bound)
    expected = []
    for planes in params["planes"]:
        product = 1.0
        for name, a, b in (("xy", 0, 1), ("xz", 0, 2), ("yz", 1, 2)):
            product *= bilinear(planes[name], unit[:, a], unit[:, b])
        for name, a in (("xt", 0), ("yt", 1), ("zt", 2)):
            product *= bilinear(planes[name], jnp.full(len(splats), t), unit[:, a])
        expected.append(product)
    features = field.features(params, splats.means, t)
    np.testing.assert_allclose(features, np.concatenate(expected, -1), rtol=2e-5)


def bilinear(plane, first, second):
    """Point by point, by the definition."""
    plane, out = np.asarray(plane, np.float64), []
    for u, v in zip(np.asarray(first, float), np.asarray(second, float), strict=True):
        u, v = u * (plane.shape[0] - 1), v * (plane.shape[1] - 1)
        i, j = min(int(u), plane.shape[0] - 2), min(int(v), plane.shape[1] - 2)
        corner = plane[i : i + 2, j : j + 2]
        out.append(np.einsum("i,j,ijc->c", [i + 1 - u, u - i], [j + 1 - v, v - j], corner))
    return np.stack(out)


def test_positions_outside_the_bound_see_the_border():
    field = HexPlane(**SIZES, bound=0.5)
    params = random_params(field)
    inside = field.features(params, jnp.array([[0.5, -0.5, 0.1]]), 0.3)
    outside = field.features(params, jnp.array([[2.0, -0.9, 0.1]]), 0.3)
    np.testing.assert_allclose(inside, outside, rtol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_agree_with_finite_differences(detach):
    field = HexPlane(**SIZES, opacity=True, detach_coordinates=detach)
    splats, params = make_splats(6), random_params(field)
    rng = np.random.default_rng(5)

    def value(params, means):
        moved = field.apply(params, dataclasses.replace(splats, means=means), 0.41)
        if detach:  # what reaches the means then is the identity alone
            means = jax.lax.stop_gradient(means)
        terms = (moved.means, moved.log_scales, moved.quaternions, moved.opacity_logits)
        return sum(jnp.sum(jnp.sin(term)) for term in terms)

    with jax.enable_x64():
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, splats.means))
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), wide)
        if detach:
            direction = (direction[0], jnp.zeros_like(direction[1]))
        gradient = jax.jit(jax.grad(value, argnums=(0, 1)))(*wide)
        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        step = 1e-6
        ahead, behind = (
            value(*jax.tree.map(lambda w, d, s=s: w + s * d, wide, direction))
            for s in (step, -step)
        )
    assert float(slope) == pytest.approx(float((ahead - behind) / (2 * step)), rel=1e-5)


ON_NODES_AND_BEYOND = [
    [0.0, 0.375, -0.375], [0.75, 0.0, 0.2], [-0.75, 0.3, 0.75], [0.9, 0.1, -0.8], [-2, 2, 0.375],
]  # fmt: skip


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_on_nodes_and_beyond_the_bound(detach):
    """On a node the cell after it counts, on the bound half of the last cell, beyond it nothing."""
    field = HexPlane(**SIZES, detach_coordinates=detach)
    params, means = random_params(field), np.array(ON_NODES_AND_BEYOND)
    on_bound = np.abs(means) == field.bound

    def per_splat(params, means, positions):
        """`positions` address the planes, `means` are moved."""
        change = field.apply(params, splats_at(positions), 0.41).means - positions
        return jnp.sum(jnp.sin(means + change), axis=1)

    def splats_at(positions):
        return dataclasses.replace(make_splats(len(means)), means=positions)

    def total(params, means):
        return jnp.sum(jnp.sin(field.apply(params, splats_at(means), 0.41).means))

    with jax.enable_x64():
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, means))
        grads, pulls = jax.jit(jax.grad(total, argnums=(0, 1)))(*wide)
        rng, step = np.random.default_rng(5), 1e-6
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), grads)
        ahead, behind = (
            total(jax.tree.map(lambda p, d, s=s: p + s * d, wide[0], direction), wide[1])
            for s in (step, -step)
        )
        slope = sum(map(np.vdot, *map(jax.tree.leaves, (grads, direction))))
        assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)
        per_splat = jax.jit(per_splat)
        for axis in range(3):
            shift = np.zeros_like(means)
            shift[:, axis] = step
            back = np.where(on_bound, shift, 0)
            far, near = wide[1] + shift, wide[1] - back
            places = (wide[1], wide[1]) if detach else (far, near)
            change = per_splat(wide[0], far, places[0]) - per_splat(wide[0], near, places[1])
            expected = np.asarray(change) / (step + back[:, axis])
            np.testing.assert_allclose(pulls[:, axis], expected, rtol=1e-4, atol=1e-4)


def test_constant_planes_cost_nothing():
    field = HexPlane(**SIZES)
    params = field.init(jax.random.key(0))
    planes = jax.tree.map(jnp.ones_like, params["planes"])
    for name, penalty in field.regularization(params | {"planes": planes}).items():
        assert float(penalty) == 0, name


@pytest.mark.parametrize(
    ("plane", "axis", "name"),
    [("xy", 0, "plane_tv"), ("xy", 1, "plane_tv"), ("yz", 1, "plane_tv"),
     ("xt", 1, "plane_tv"), ("xt", 0, "time_smoothness")],
)  # fmt: skip
def test_regularisers_see_roughness_along_both_axes(plane, axis, name):
    field = HexPlane(**SIZES)
    params = field.init(jax.random.key(0))
    planes = jax.tree.map(jnp.ones_like, params["planes"])
    shape = np.ones(3, int)
    shape[axis] = -1
    wave = (-1.0) ** jnp.arange(planes[0][plane].shape[axis]).reshape(shape)
    planes[0][plane] = planes[0][plane] + 0.1 * wave
    penalties = field.regularization(params | {"planes": planes})
    # Second differences of +-0.1 are +-0.4.
    assert float(penalties[name]) == pytest.approx(0.16, rel=1e-4)
    other = {"plane_tv", "time_smoothness"} - {name}
    assert float(penalties[other.pop()]) == 0


def test_hold_freezes_the_future_and_keeps_the_past():
    field, splats = HexPlane(**SIZES), make_splats()
    params = random_params(field)
    held = field.hold(params, 1 / 3)  # at the second of four nodes
    past, future = [0.0, 0.2, 1 / 3], [0.5, 0.8, 1.0]
    np.testing.assert_allclose(
        positions_at(field, held, splats, past),
        positions_at(field, params, splats, past),
        rtol=1e-5,
    )
    now = positions_at(field, params, splats, [1 / 3])
    later = positions_at(field, held, splats, future)
    np.testing.assert_allclose(later, np.repeat(now, 3, 0), rtol=1e-5)


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_hold_between_two_nodes_keeps_the_moment_itself(t):
    field, splats = HexPlane(**SIZES), make_splats()
    params = random_params(field)
    held = field.hold(params, t)
    np.testing.assert_allclose(
        positions_at(field, held, splats, [0.0, t]),
        positions_at(field, params, splats, [0.0, t]),
        rtol=1e-5,
    )
    last = positions_at(field, held, splats, [0.7, 1.0])
    np.testing.assert_allclose(last[0], last[1], rtol=1e-5)


def test_lookups_reproduce_linear_functions():
    x, y = jnp.linspace(0, 1, 4), jnp.linspace(0, 1, 6)
    plane = (2 * x[:, None] - y[None, :] + 1)[..., None]
    at = jnp.array([[0.0, 0.0], [1.0, 1.0], [0.3, 0.77]])
    np.testing.assert_allclose(
        lookup_plane(plane, at)[:, 0], 2 * at[:, 0] - at[:, 1] + 1, rtol=1e-5
    )
    np.testing.assert_allclose(slice_at(plane, 0.25)[:, 0], 1.5 - y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degree", [0, 2])
def test_the_sh_head_recolours_whatever_the_degree(degree):
    field = HexPlane(**SIZES, sh=True)
    splats = Splats.from_points(
        make_splats(6).means, np.full((6, 3), 0.4), scale=0.1, sh_degree=degree
    )
    params = field.init(jax.random.key(0), splats)
    np.testing.assert_array_equal(field.apply(params, splats, 0.3).sh, splats.sh)
    coefficients = (degree + 1) ** 2
    params["heads"]["sh"]["bias"] = jnp.arange(3.0 * coefficients)
    moved = field.apply(params, splats, 0.3)
    expected = np.arange(3 * coefficients).reshape(1, coefficients, 3)
    np.testing.assert_allclose(
        moved.sh - splats.sh, np.broadcast_to(expected, splats.sh.shape), atol=1e-5
    )
    np.testing.assert_array_equal(moved.means, splats.means)


def test_the_sh_head_explains_what_it_needs():
    field, splats = HexPlane(**SIZES, sh=True), make_splats()
    with pytest.raises(ValueError, match="needs the splats when sh=True"):
        field.init(jax.random.key(0))
    params = field.init(jax.random.key(0), splats)
    other = Splats.from_points(splats.means, np.full((20, 3), 0.4), scale=0.1, sh_degree=1)
    with pytest.raises(ValueError, match="for splats with 1 coefficients, these have 4"):
        field.apply(params, other, 0.0)


REFERENCE = SIZES | {"depth": 1, "compat": "4dgs"}


def test_like_the_reference_half_of_each_time_plane_is_idle():
    """With 4 nodes, t = 0 lies between the second and the third."""
    field, splats = HexPlane(**REFERENCE, opacity=True), make_splats()
    params = random_params(field)
    instants = jnp.linspace(0, 1, 5)
    apply = jax.jit(jax.vmap(lambda params, t: field.apply(params, splats, t).means, (None, 0)))
    before = apply(params, instants)
    for node in range(field.time_resolution):
        planes = ({**params["planes"][0]}, params["planes"][1])
        planes[0]["xt"] = planes[0]["xt"].at[node].add(0.5)
        moved = np.abs(apply(params | {"planes": planes}, instants) - before).max(axis=(1, 2))
        weights = np.maximum(0, 1 - np.abs((1 + np.asarray(instants)) * 1.5 - node))
        np.testing.assert_array_equal(moved > 1e-6, weights > 1e-6)
        assert np.any(moved) == (node > 0)
    held = apply(field.hold(params, 1 / 3), instants)  # 1/3 is the third node
    np.testing.assert_allclose(held[:2], before[:2], rtol=1e-5)
    np.testing.assert_allclose(held[2:], jnp.stack([held[-1]] * 3), rtol=1e-5)
    peaks = field.peak_opacities(params, splats)
    at_nodes = [field.apply(params, splats, t).opacity_logits for t in (0.0, 1 / 3, 1.0)]
    np.testing.assert_allclose(peaks, jax.nn.sigmoid(np.max(at_nodes, axis=0)), rtol=1e-5)


def test_like_the_reference_every_head_is_a_network_of_its_own():
    field, splats = HexPlane(**REFERENCE), make_splats()
    params = jax.tree.map(lambda leaf: leaf - 0.7, random_params(field))
    change = field.apply(params, splats, 0.2).log_scales - splats.log_scales

    def dense(layer, inputs):
        return inputs @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])

    head = params["heads"]["scale"]
    features = np.asarray(field.features(params, splats.means, 0.2))
    trunk = np.maximum(dense(params["trunk"][0], features), 0)
    expected = dense(head, np.maximum(dense(head["hidden"], trunk), 0))
    np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-5)


def test_like_the_reference_nothing_starts_at_zero():
    field = HexPlane(compat="4dgs", depth=1, spatial_resolution=4)
    splats = make_splats()
    params = field.init(jax.random.key(0), splats)
    moved = field.apply(params, splats, 0.5)
    for name in ("means", "log_scales", "quaternions"):
        assert np.all(np.abs(getattr(moved, name) - getattr(splats, name)).max(axis=0) > 1e-3)
    head = params["heads"]["rotation"]
    for layer in (*params["trunk"], head["hidden"], head):
        inputs, outputs = layer["kernel"].shape
        for leaf, limit in (
            (layer["kernel"], (6 / (inputs + outputs)) ** 0.5),
            (layer["bias"], inputs**-0.5),
        ):
            assert np.abs(leaf).max() <= limit
            if leaf.size >= 64:  # the spread of a uniform distribution
                assert np.std(leaf) == pytest.approx(limit / 3**0.5, rel=0.25)


@pytest.mark.parametrize(
    ("plane", "axis", "penalised"),
    [("xy", 0, None), ("xy", 1, "plane_tv"), ("yz", 1, "plane_tv"), ("zt", 1, None),
     ("zt", 0, "time_smoothness")],
)  # fmt: skip
def test_like_the_reference_planes_are_smooth_along_one_axis(plane, axis, penalised):
    field = HexPlane(**REFERENCE)
    planes = jax.tree.map(jnp.ones_like, field.init(jax.random.key(0))["planes"])
    shape = np.ones(3, int)
    shape[axis] = -1
    wave = (-1.0) ** jnp.arange(planes[0][plane].shape[axis]).reshape(shape)
    planes[0][plane] = planes[0][plane] + 0.1 * wave
    penalties = field.regularization({"planes": planes})
    for name in ("plane_tv", "time_smoothness"):
        assert float(penalties[name]) == pytest.approx(0.16 * (name == penalised), rel=1e-4)


def test_bad_sizes_and_names_are_explained():
    with pytest.raises(ValueError, match="at least 2 nodes per axis"):
        HexPlane(time_resolution=1)
    with pytest.raises(ValueError, match=r"must be positive; got -1"):
        HexPlane(bound=-1.0)
    with pytest.raises(ValueError, match="at least 1 hidden layer; got depth=0"):
        HexPlane(depth=0)
    with pytest.raises(ValueError, match="compat='3dgs' is unknown to HexPlane"):
        HexPlane(compat="3dgs")
    with pytest.raises(ValueError, match="Unknown deformation 'hexplan'"):
        build({"name": "hexplan"})
    with pytest.raises(ValueError, match="Bad arguments for the deformation 'hexplane'"):
        build({"name": "hexplane", "chanels": 3})
