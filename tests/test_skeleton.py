"""The control points themselves as splats, and the stage that fits them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.deformation import build
from gaussians.deformation.skeleton import Skeleton
from gaussians.reconstruct import ReconstructConfig
from gaussians.stages import Stage
from gaussians.types import Splats

NODES = {"name": "control_points", "num_nodes": 6, "graph_neighbours": 3, "time_resolution": 5}
STACK = {"name": "lifespan", "base": {"name": "keyframes", "base": NODES, "bodies": 2}}
TWO = jnp.arange(40) % 2 == 1


@pytest.fixture(scope="module")
def splats():
    """A red cluster and a green one, and free slots that hold any numbers."""
    rng = np.random.default_rng(0)
    places = rng.normal(0, 0.05, (40, 3)) + np.where(TWO, 0.4, -0.4)[:, None]
    colours = np.where(TWO[:, None], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    made = Splats.from_points(places, colours, scale=0.02, capacity=50)
    free = ~np.asarray(made.active)
    return dataclasses.replace(made, means=jnp.where(free[:, None], jnp.nan, made.means))


def moving(field, splats):
    """Parameters with a motion that differs from node to node."""
    params = field.init(jax.random.key(0), splats)
    rng = np.random.default_rng(1)

    def move(path, leaf):
        noise = jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        return leaf + noise if "poses" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def test_nodes_are_where_they_move_to_and_look_like_what_they_carry(splats):
    field = build(NODES)
    params = moving(field, splats)
    trajectories, _ = field.trajectories(params)
    for instant, t in enumerate(np.linspace(0, 1, 5)):
        shown = Skeleton(field).apply(params, splats, t)
        assert len(shown) == len(splats)
        np.testing.assert_array_equal(shown.active, np.arange(50) < 6)
        np.testing.assert_allclose(shown.means[:6], trajectories[instant], atol=1e-6)
        green = np.asarray(params["nodes"]["positions"])[:, 0] > 0
        expected = np.where(green[:, None], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
        np.testing.assert_allclose(shown.sh[:6, 0] * 0.28209479 + 0.5, expected, atol=1e-4)
        sizes = np.exp(np.asarray(shown.log_scales[:6]))
        assert np.all((sizes > 0.005) & (sizes < 0.06))  # a part of a cluster, not the whole
        assert np.all(np.isfinite(np.asarray(shown.means)))


def test_only_motion_and_places_of_the_nodes_get_a_gradient(splats):
    field = build(NODES)

    def loss(params, opacity_logits):
        given = dataclasses.replace(splats, opacity_logits=opacity_logits)
        shown = field.skeleton(params, given, 0.3)
        parts = (shown.means, shown.log_scales, shown.quaternions, shown.sh)
        return sum(jnp.sum(jnp.where(shown.active[:, None], p.reshape(50, -1), 0)) for p in parts)

    params = moving(field, splats)
    of_params, of_splats = jax.grad(loss, argnums=(0, 1))(params, splats.opacity_logits)
    assert np.all(np.asarray(of_splats) == 0)
    nodes = of_params["nodes"]
    assert np.all(np.asarray(nodes["positions"]) == 1)  # each moves its ball, and nothing else
    assert not np.any(nodes["log_radii"]) and not np.any(nodes["weight_logits"])
    assert all(np.any(leaf) for leaf in of_params["poses"].values())


def test_a_stack_shows_the_nodes_of_the_body_on_stage(splats):
    field = build(STACK)
    params = moving(field, splats)
    inner = jax.tree.map(lambda leaf: leaf[0], params["base"]["base"])
    expected = build(NODES).skeleton(inner, splats, 0.7)
    jax.tree.map(
        np.testing.assert_array_equal, Skeleton(field).apply(params, splats, 0.7), expected
    )
    members = jnp.arange(50) % 2 == 1
    params = field.with_body(params, splats, members, 0.5, 2.0, key=jax.random.key(1))
    before, after = (Skeleton(field).apply(params, splats, t) for t in (0.4, 0.6))
    assert np.asarray(before.means[:6, 0])[before.active[:6]].min() < 0
    assert np.asarray(after.means[:6, 0])[after.active[:6]].min() > 0  # the green cluster alone


def test_there_must_be_nodes_and_slots_for_them(splats):
    assert Skeleton.carries(build(STACK)) and Skeleton.carries(build(NODES))
    plane = {"name": "hexplane", "spatial_resolution": 4, "time_resolution": 4}
    for spec in (plane, {"name": "lifespan", "base": plane}, {"name": "identity"}):
        assert not Skeleton.carries(build(spec))
        with pytest.raises(ValueError, match=f"'{spec['name']}' has no control points"):
            ReconstructConfig(deformation=spec, nodes=Stage(3))
    few = jax.tree.map(lambda leaf: leaf[:5], splats)
    field = build(NODES)
    with pytest.raises(ValueError, match="6 nodes do not fit in 5 slots: raise the capacity"):
        field.skeleton(field.init(jax.random.key(0), splats), few, 0.0)
