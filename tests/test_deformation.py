import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.deformation import build
from gaussians.types import Splats

BASE = {
    "name": "hexplane",
    "spatial_resolution": 4,
    "time_resolution": 3,
    "channels": 2,
    "width": 4,
}
NODES = {"name": "control_points", "num_nodes": 4, "neighbours": 2, "graph_neighbours": 2}
LIFESPAN = {"name": "lifespan", "base": BASE, "knots": 11}


@pytest.fixture(scope="module")
def splats():
    rng = np.random.default_rng(0)
    return Splats.from_points(rng.uniform(-0.5, 0.5, (6, 3)), rng.random((6, 3)), scale=0.1)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "identity"},
        BASE,
        NODES | {"motion": "mlp"},
        LIFESPAN,
        LIFESPAN | {"base": NODES},
        {"name": "keyframes", "base": NODES},
        LIFESPAN | {"base": {"name": "keyframes", "base": BASE}},
    ],
    ids=lambda s: s["name"],
)
def test_every_field_keeps_the_protocol(spec, splats):
    field = build(spec)
    params = field.init(jax.random.key(0), splats)
    moved = jax.jit(field.apply)(params, splats, 0.3)
    for old, new in zip(jax.tree.leaves(splats), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(float(value) >= 0 for value in field.regularization(params).values())
    source = jnp.arange(6)[::-1]
    for changed in (field.gather(params, source), field.hold(params, 0.5)):
        assert jax.tree.structure(changed) == jax.tree.structure(params)
    assert hash(field) == hash(build(spec)) and field == build(spec)


def test_a_curve_hides_and_shows_its_splat(splats):
    field = build(LIFESPAN | {"knots": 3})
    params = field.init(jax.random.key(0), splats)
    params = params | {"curves": params["curves"].at[:, 1].set(jnp.array([-6.0, 0.0, 2.0]))}
    for t, expected in ((0, -6), (0.25, -3), (0.5, 0), (1, 2)):
        change = field.apply(params, splats, t).opacity_logits - splats.opacity_logits
        np.testing.assert_allclose(change, expected * (np.arange(6) == 1), atol=1e-5)


def test_a_curve_costs_and_is_pulled_back(splats):
    field = build(LIFESPAN)
    params = field.init(jax.random.key(0), splats)
    shifted = params | {"curves": params["curves"] + 1.0}
    penalty = lambda p: field.regularization(p)["lifespan"]  # noqa: E731
    assert float(penalty(shifted)) == pytest.approx(1.0)
    assert np.all(np.asarray(jax.grad(penalty)(shifted)["curves"]) > 0)


def test_descendants_inherit_the_curve_of_their_parent(splats):
    field = build(LIFESPAN)
    params = field.init(jax.random.key(0), splats)
    params = params | {"curves": params["curves"].at[3:, 4].set(-6.0)}
    source = jnp.array([4, 1, 2, 3, 4, 5])
    curves = np.asarray(field.gather(params, source)["curves"])
    np.testing.assert_array_equal(curves[:, 0], curves[:, 4])
    assert curves[:, 0].min() < -5 and not curves[:, 1].any()


def test_a_lifespan_needs_two_knots():
    with pytest.raises(ValueError, match="at least 2 knots; got 1"):
        build({"name": "lifespan", "base": BASE, "knots": 1})
