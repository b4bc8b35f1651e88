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


def test_a_window_hides_its_splats_outside_of_it(splats):
    field = build(LIFESPAN)
    members = jnp.arange(6) < 2
    params = field.init(jax.random.key(0), splats)
    params = field.with_window(params, members, 0.4, 0.6, fade_time=0.2, depth=6.0)

    def change(t):
        return np.asarray(field.apply(params, splats, t).opacity_logits - splats.opacity_logits)

    for t, expected in ((0.5, 0), (0.4, 0), (0.3, -3), (0.2, -6), (0.0, -6), (0.7, -3), (1.0, -6)):
        np.testing.assert_allclose(change(t)[:2], expected, atol=1e-5)
        np.testing.assert_allclose(change(t)[2:], 0, atol=1e-6)
    params = field.without_window(params, jnp.arange(6) == 3, 0.4, 0.6, fade_time=0.2, depth=6.0)
    for t, expected in ((0.5, -6), (0.3, -3), (0.2, 0), (1.0, 0)):
        np.testing.assert_allclose(change(t)[3], expected, atol=1e-5)
    assert float(field.regularization(params)["lifespan"]) == 0  # a window is a prior, not a cost


def test_a_curve_away_from_its_prior_costs_and_is_pulled_back(splats):
    field = build(LIFESPAN)
    params = field.init(jax.random.key(0), splats)
    shifted = params | {"curves": params["curves"] + 1.0}
    penalty = lambda p: field.regularization(p)["lifespan"]  # noqa: E731
    assert float(penalty(shifted)) == pytest.approx(1.0)
    gradient = jax.grad(penalty)(shifted)
    assert np.all(np.asarray(gradient["curves"]) > 0)
    assert not np.any(np.asarray(gradient["priors"]))


def test_descendants_inherit_the_curve_of_their_parent(splats):
    field = build(LIFESPAN)
    params = field.init(jax.random.key(0), splats)
    params = field.with_window(params, jnp.arange(6) == 4, 0.0, 0.2)
    source = jnp.array([4, 1, 2, 3, 4, 5])
    curves = np.asarray(field.gather(params, source)["curves"])
    np.testing.assert_array_equal(curves[:, 0], curves[:, 4])
    assert curves[:, 0].min() < -5 and not curves[:, 1].any()


def test_a_lifespan_needs_two_knots():
    with pytest.raises(ValueError, match="at least 2 knots; got 1"):
        build({"name": "lifespan", "base": BASE, "knots": 1})
