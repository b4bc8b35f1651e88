import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from gaussians.deformation import build, rigidity
from gaussians.deformation.control_points import ControlPoints, farthest_points
from gaussians.types import Splats

SIZES = {"num_nodes": 7, "graph_neighbours": 4, "time_resolution": 5}
MLP = {**SIZES, "motion": "mlp", "depth": 4, "width": 8, "position_frequencies": 2}


def make_splats(count=30, seed=0, capacity=None):
    rng = np.random.default_rng(seed)
    splats = Splats.from_points(
        rng.uniform(-0.5, 0.5, (count, 3)), rng.random((count, 3)), scale=0.05, capacity=capacity
    )
    quaternions = rng.normal(size=splats.quaternions.shape)  # of any norm
    return dataclasses.replace(splats, quaternions=jnp.asarray(quaternions, jnp.float32))


def first_params(field, splats):
    return jax.jit(field.init)(jax.random.key(0), splats)


def random_params(field, splats, seed=1, size=0.5):
    """Parameters with nothing at rest."""
    rng = np.random.default_rng(seed)
    params = first_params(field, splats)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype), params
    )


def rotation_of(quaternions):
    return Rotation.from_quat(np.asarray(quaternions, float), scalar_first=True)


def rigid_motion(field, params, rotations, shifts):
    """A table under which every node makes the same motion of the whole space."""
    rest = np.asarray(params["nodes"]["positions"], float)
    translations = np.stack(
        [r.apply(rest) + s - rest for r, s in zip(rotations, shifts, strict=True)]
    )
    change = np.stack([r.as_quat(scalar_first=True) for r in rotations]) - [1, 0, 0, 0]
    change = np.repeat(change[:, None], len(rest), axis=1)
    poses = {"translations": jnp.asarray(translations), "rotations": jnp.asarray(change)}
    return params | {"poses": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), poses)}


@pytest.mark.parametrize("sizes", [SIZES, MLP | {"scales": True}], ids=["table", "mlp"])
def test_starts_exactly_as_the_identity(sizes):
    field, splats = ControlPoints(**sizes), make_splats(capacity=33)
    params = first_params(field, splats)
    apply = jax.jit(field.apply)
    for t in (0.0, 0.37, 1.0):
        jax.tree.map(np.testing.assert_array_equal, apply(params, splats, t), splats)
    for name, value in jax.jit(field.regularization)(params).items():
        assert float(value) < 1e-12, name


@pytest.mark.parametrize("count", [1, 3, 14])
def test_nearest_agrees_with_a_stable_sort(count):
    rng = np.random.default_rng(count)
    points, nodes = (rng.normal(size=(n, 3)).astype(np.float32) for n in (200, 11))
    nodes = np.concatenate([nodes, nodes[2:5]])  # of equally near nodes the first wins
    distances = np.linalg.norm(points[:, None] - nodes.astype(float), axis=-1)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(rigidity.nearest(points, nodes, count), expected)


def naive_farthest_points(points, count):
    picks = [int(np.argmax(((points - points.mean(0)) ** 2).sum(-1)))]
    while len(picks) < count:
        gaps = ((points[:, None] - points[picks]) ** 2).sum(-1).min(1)
        picks.append(int(np.argmax(gaps)))
    return picks


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_farthest_points_are_the_classic_ones_of_the_active_slots(seed):
    rng = np.random.default_rng(seed)
    points, active = rng.normal(size=(40, 3)), rng.random(40) < 0.6
    active[:12] = rng.permutation([True] * 9 + [False] * 3)
    expected = np.flatnonzero(active)[naive_farthest_points(points[active], 9)]
    points[~active] = rng.choice([0, 1e30, 3, -7], ((~active).sum(), 3))
    chosen = farthest_points(points.astype(np.float32), 9, active)
    np.testing.assert_array_equal(chosen, expected)
    order = rng.permutation(40)
    shuffled = farthest_points(points[order].astype(np.float32), 9, active[order])
    np.testing.assert_array_equal(order[shuffled], expected)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_as_many_nodes_as_splats_or_more(count):
    """With more, nodes coincide; everything stays finite and a push still moves the splats."""
    field, splats = ControlPoints(**SIZES), make_splats(count, capacity=9)
    params = first_params(field, splats)
    used = set(map(tuple, np.asarray(params["nodes"]["positions"])))
    assert used == set(map(tuple, np.asarray(splats.means)[:count]))

    def value(params):
        moved = field.apply(params, splats, 0.4)
        return jnp.sum(moved.means**2) + sum(field.regularization(params).values())

    gradient = jax.jit(jax.grad(value))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["poses"]["translations"]).max() > 0.1


def blended_by_hand(field, params, splats, t):
    """Linear blend skinning, splat by splat and node by node, by the definition."""
    nodes = {name: np.asarray(leaf, float) for name, leaf in params["nodes"].items()}
    poses = {
        name: np.asarray(leaf, float) for name, leaf in jax.jit(field.poses)(params, t).items()
    }
    if field.motion == "table":
        at = t * (field.time_resolution - 1)
        a, b = int(at), int(at) + 1
        table = {k: np.asarray(v, float) for k, v in params["poses"].items()}
        poses = {k: (b - at) * v[a] + (at - a) * v[b] for k, v in table.items()}
        poses["rotations"] = poses["rotations"] + [1, 0, 0, 0]
    tree = cKDTree(nodes["positions"])
    means, quaternions, log_scales = [], [], []
    for i in range(len(splats)):
        x = np.asarray(splats.means[i], float)
        distances, near = tree.query(x, field.neighbours)
        share = np.exp(-(distances**2) / (2 * np.exp(nodes["log_radii"][near]) ** 2))
        share /= 1 + np.exp(-nodes["weight_logits"][near])
        share /= share.sum()
        mean, growth, turn = np.zeros(3), np.zeros(3), np.zeros(4)
        for w, k in zip(share, near, strict=True):
            rotation = rotation_of(poses["rotations"][k])
            node = nodes["positions"][k]
            mean += w * (rotation.apply(x - node) + node + poses["translations"][k])
            growth += w * poses["log_scales"][k]
            q = rotation.as_quat(scalar_first=True)
            q *= np.sign(q @ poses["rotations"][near[0]])
            turn += w * q
        means.append(mean)
        log_scales.append(np.asarray(splats.log_scales[i]) + growth)
        length = np.linalg.norm(splats.quaternions[i])
        turned = rotation_of(turn) * rotation_of(splats.quaternions[i])
        quaternions.append(length * turned.as_quat(scalar_first=True))
    return np.array(means), np.array(quaternions), np.array(log_scales)


@pytest.mark.parametrize("sizes", [SIZES, MLP], ids=["table", "mlp"])
def test_skinning_agrees_with_loops(sizes):
    field, splats = ControlPoints(**sizes, scales=True), make_splats()
    params = random_params(field, splats, size=0.8)
    apply = jax.jit(field.apply)
    for t in (0.0, 0.41, 0.9):
        moved = apply(params, splats, t)
        means, quaternions, log_scales = blended_by_hand(field, params, splats, t)
        np.testing.assert_allclose(moved.means, means, atol=2e-5)
        np.testing.assert_allclose(moved.log_scales, log_scales, atol=2e-5)
        same = np.sign(np.sum(np.asarray(moved.quaternions) * quaternions, -1, keepdims=True))
        np.testing.assert_allclose(moved.quaternions, same * quaternions, atol=5e-5)
    along = jax.jit(jax.vmap(field.apply, (None, None, 0)))(params, splats, jnp.array([0.2, 0.9]))
    np.testing.assert_allclose(along.means[1], moved.means, atol=1e-6)


def test_a_rigid_motion_of_the_nodes_is_one_of_the_splats():
    field, splats = ControlPoints(**SIZES), make_splats()
    turns = Rotation.from_rotvec(np.outer(np.linspace(0, 2.5, 5), [0.6, 0.0, 0.8]))
    shifts = np.random.default_rng(2).normal(size=(5, 3))
    params = rigid_motion(field, random_params(field, splats), list(turns), shifts)
    apply = jax.jit(field.apply)
    for instant in range(5):
        moved = apply(params, splats, instant / 4)
        means = turns[instant].apply(splats.means) + shifts[instant]
        np.testing.assert_allclose(moved.means, means, atol=1e-5)
        expected = turns[instant] * rotation_of(splats.quaternions)
        assert (rotation_of(moved.quaternions).inv() * expected).magnitude().max() < 1e-5
    penalties = jax.jit(field.regularization)(params)
    assert float(penalties["arap"]) < 1e-10 and float(penalties["acceleration"]) > 0.1


def test_arap_of_known_deformations():
    rng = np.random.default_rng(0)
    rest = rng.normal(size=(9, 3)).astype(np.float32)
    neighbours, weights = rigidity.neighbour_graph(rest, 3)
    distances, expected = cKDTree(rest).query(rest, [2, 3, 4])
    np.testing.assert_array_equal(neighbours, expected)
    shares = np.exp(-(distances**2) / np.mean(distances**2))
    np.testing.assert_allclose(weights, shares / shares.sum(1, keepdims=True), rtol=1e-5)

    still = np.broadcast_to(np.eye(3, dtype=np.float32), (2, 9, 3, 3))
    grown = np.stack([rest, 1.2 * rest + 3]).astype(np.float32)  # the second a fifth larger
    value = rigidity.arap(rest, grown, still, neighbours, weights)
    assert float(value) == pytest.approx(0.2**2 / 2, rel=1e-4)
    scaled = rigidity.arap(10 * rest, 10 * grown, still, neighbours, weights)
    assert float(scaled) == pytest.approx(float(value), rel=1e-4)


def test_arap_grows_linearly_where_links_tear():
    """Pseudo-Huber: s^2 for small stretches s, 2 c s for large ones."""
    rest = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    graph = rigidity.neighbour_graph(rest, 1)
    still = np.broadcast_to(np.eye(3, dtype=np.float32), (1, 2, 3, 3))

    def cost(stretch, tolerance, **kind):
        moved = rest[None] + np.array([[0, 0, 0], [stretch, 0, 0]], np.float32)
        return float(rigidity.arap(rest, moved, still, *graph, tolerance, **kind))

    assert cost(0.01, 0.1) == pytest.approx(1e-4, rel=0.01)
    assert cost(100.0, 0.1) == pytest.approx(20.0, rel=0.01)
    assert cost(0.5, math.inf) == pytest.approx(0.25)
    assert cost(0.0, 0.1) == 0
    assert cost(0.01, 0.3, saturating=True) == pytest.approx(1e-4, rel=0.01)
    assert cost(0.3, 0.3, saturating=True) == pytest.approx(0.09 / 2)
    assert cost(100.0, 0.3, saturating=True) == pytest.approx(0.09, rel=0.01)


def test_at_its_best_rotations_arap_is_that_of_sc_gs():
    """There the rotation is fitted by an SVD; scipy's Kabsch algorithm stands in for it."""
    rng = np.random.default_rng(3)
    rest = rng.normal(size=(8, 3))
    moved = Rotation.from_rotvec([0.4, 0.9, 0.1]).apply(rest) + 0.1 * rng.normal(size=(8, 3))
    neighbours, weights = map(np.asarray, rigidity.neighbour_graph(rest.astype(np.float32), 4))
    total, length, fitted = 0.0, 0.0, []
    for i in range(8):
        links, now = rest[neighbours[i]] - rest[i], moved[neighbours[i]] - moved[i]
        rotation, root = Rotation.align_vectors(now, links, weights[i])
        fitted.append(rotation.as_matrix())
        total += root**2
        length += weights[i] @ np.sum(links**2, -1)
    arguments = [np.asarray(a, np.float32) for a in (rest, moved[None])]

    def value(rotations):
        rotations = np.asarray(rotations, np.float32)[None]
        return float(rigidity.arap(*arguments, rotations, neighbours, weights))

    assert value(fitted) == pytest.approx(total / length, rel=1e-4)
    for seed in range(3):
        nudge = Rotation.from_rotvec(np.random.default_rng(seed).normal(size=3) * 0.05)
        assert value(nudge.as_matrix() @ fitted) > value(fitted)


def test_acceleration_is_that_of_the_nodes():
    instants = jnp.arange(5.0)[:, None, None]
    steady = instants * jnp.array([1.0, -2.0, 0.5]) + jnp.arange(4.0)[:, None]
    assert float(rigidity.acceleration(steady)) < 1e-10
    falling = instants**2 * jnp.array([0.0, 0.0, 0.5]) + steady
    assert float(rigidity.acceleration(falling)) == pytest.approx(1.0, rel=1e-4)
    assert float(rigidity.acceleration(falling[:2])) == 0


@pytest.mark.parametrize(("sizes", "detach"), [(SIZES, False), (MLP, True)], ids=["table", "mlp"])
def test_gradients_agree_with_finite_differences(sizes, detach):
    field = ControlPoints(**sizes, scales=True, detach_coordinates=detach)
    splats = make_splats(12)
    params = random_params(field, splats, size=0.1)
    rng = np.random.default_rng(5)

    def value(params, means):
        moved = field.apply(params, dataclasses.replace(splats, means=means), 0.41)
        terms = (moved.means, moved.log_scales, moved.quaternions)
        total = sum(jnp.sum(jnp.sin(3 * term)) for term in terms)
        penalties = field.regularization(params | {"nodes": nodes})  # the nodes are constants there
        return total + sum(penalties.values())

    with jax.enable_x64():
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, splats.means))
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), wide)
        nodes = wide[0]["nodes"]
        if field.motion == "mlp":  # to which the nodes' positions are constants
            direction[0]["nodes"]["positions"] *= 0
        if detach:
            direction = (direction[0], jnp.zeros_like(direction[1]))
        gradient = jax.jit(jax.grad(value, argnums=(0, 1)))(*wide)
        products = jax.tree.map(jnp.vdot, gradient, direction)
        compiled = jax.jit(value)
        ahead, behind = (
            compiled(*jax.tree.map(lambda w, d, s=s: w + s * d, wide, direction))
            for s in (1e-6, -1e-6)
        )
        slope = float(sum(jax.tree.leaves(products)))
    assert slope == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-5)


def test_the_nodes_places_and_weights_cannot_appease_the_penalties():
    field, splats = ControlPoints(**SIZES), make_splats()
    params = random_params(field, splats)
    gradient = jax.jit(jax.grad(lambda p: sum(field.regularization(p).values())))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["nodes"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["poses"]))


def test_unused_slots_hold_any_numbers():
    field, splats = ControlPoints(**SIZES), make_splats(20, capacity=30)
    wild = dataclasses.replace(splats, means=splats.means.at[20:].set(1e30))
    params = random_params(field, splats)
    jax.tree.map(
        np.testing.assert_array_equal, field.init(jax.random.key(0), wild),
        field.init(jax.random.key(0), splats),
    )  # fmt: skip

    def value(params, splats):
        moved = field.apply(params, splats, 0.3)
        return jnp.sum(jnp.where(splats.active[:, None], moved.means, 0) ** 2), moved

    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    ((_, moved), gradient), ((_, other), outcome) = (run(params, s) for s in (splats, wild))
    np.testing.assert_array_equal(moved.means[:20], other.means[:20])
    jax.tree.map(np.testing.assert_array_equal, gradient, outcome)


def test_results_follow_the_splats_through_densification():
    field, splats = ControlPoints(**SIZES), make_splats()
    params = random_params(field, splats)
    source = jnp.asarray(np.random.default_rng(4).integers(0, 30, 30))
    rows = jax.tree.map(lambda leaf: leaf[source], splats)
    apply = jax.jit(lambda p, s: field.apply(p, s, 0.6))
    moved = apply(field.gather(params, source), rows)
    expected = jax.tree.map(lambda leaf: leaf[source], apply(params, splats))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved, expected)


def test_hold_keeps_the_past_and_freezes_the_future():
    field, splats = ControlPoints(**SIZES, scales=True), make_splats()
    params = random_params(field, splats)
    held, apply = jax.jit(field.hold)(params, jnp.float32(0.5)), jax.jit(field.apply)
    for t in (0.0, 0.2, 0.5):
        before, after = (apply(p, splats, t) for p in (params, held))
        jax.tree.map(np.testing.assert_array_equal, before, after)
    later = apply(held, splats, 0.8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), later, after)
    network = ControlPoints(**MLP)
    params = random_params(network, splats)
    jax.tree.map(np.testing.assert_array_equal, network.hold(params, 0.5), params)


def articulated_body(count, instants):
    """Two bars joined at the origin, of which one swings out by 70 degrees, and their paths."""
    rng = np.random.default_rng(0)
    rest = rng.uniform([-0.5, -0.08, -0.08], [0.5, 0.08, 0.08], (count, 3))
    swing = Rotation.from_rotvec(np.outer(np.linspace(0, np.radians(70), instants), [0, 0, 1.0]))
    paths = np.stack([np.where(rest[:, :1] > 0, s.apply(rest), rest) for s in swing])
    return rest.astype(np.float32), paths.astype(np.float32)


def fit(field, rest, paths, seen, weights, rate, steps=100):
    """Adam on the paths of the points seen, for each weight of `arap`: parameters and errors."""
    splats = Splats.from_points(rest, np.full_like(rest, 0.5), scale=0.02)
    times = jnp.linspace(0, 1, len(paths))
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def moved(params):
        return jax.vmap(lambda t: field.apply(params, splats, t).means)(times)

    def loss(params, arap):
        error = jnp.sum((moved(params) - paths) ** 2, axis=-1)
        return jnp.mean(error[:, seen]) + arap * field.regularization(params)["arap"]

    @jax.jit
    def run(params, arap):
        def step(state, _):
            params, moments = state
            updates, moments = adam.update(jax.grad(loss)(params, arap), moments)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=steps)
        return params, jnp.linalg.norm(moved(params) - paths, axis=-1)

    return [run(first_params(field, splats), arap) for arap in weights]


def test_an_articulated_motion_is_recovered_and_rigidity_keeps_lengths():
    """Only one side of the body is seen."""
    rest, paths = articulated_body(200, 3)
    field, seen = ControlPoints(graph_neighbours=6, time_resolution=3), rest[:, 2] > 0.0
    rigid, loose = fit(field, rest, paths, seen, weights=(0.02, 0.0), rate=3e-2)

    def stretch(params):
        nodes = np.asarray(field.trajectories(params)[0])
        links = rigidity.neighbour_graph(nodes[0], 6)[0]
        lengths = np.linalg.norm(nodes[:, links] - nodes[:, :, None], axis=-1)
        return np.median(np.abs(lengths[-1] / lengths[0] - 1))

    for _, errors in (rigid, loose):
        assert errors[:, seen].mean() < 0.005 < 0.1 < np.abs(paths[-1] - rest).max()
    assert rigid[1][:, ~seen].mean() < 0.02
    assert stretch(rigid[0]) < 0.04 < 0.15 < stretch(loose[0])


def test_the_network_learns_the_same_motion():
    rest, paths = articulated_body(60, 2)
    field = ControlPoints(num_nodes=16, motion="mlp", width=32, time_resolution=2)
    ((_, errors),) = fit(field, rest, paths, np.full(60, True), weights=(0.001,), rate=1e-2)
    assert errors.mean() < 0.02 < 0.08 < np.linalg.norm(paths - rest, axis=-1).mean()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_nodes": 3}, "neighbours=3 must be at least 1 and below num_nodes=3"),
        ({"graph_neighbours": 0}, "graph_neighbours=0 must be at least 1"),
        ({"motion": "spline"}, "motion must be 'table' or 'mlp'; got 'spline'"),
        ({"time_resolution": 1}, "at least 2 instants; got time_resolution=1"),
        ({"radius": 0.0}, "must be positive; got 0.0"),
        ({"depth": 0}, "got depth=0, width=128"),
        ({"time_frequencies": -1}, "cannot be negative; got position_frequencies=10"),
    ],
)
def test_bad_sizes_get_a_clear_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build({"name": "control_points", **arguments})
