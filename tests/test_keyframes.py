"""Bodies that take turns: who is visible when, what moves whom, and what training leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.deformation import build
from gaussians.types import Splats

NODES = {"name": "control_points", "num_nodes": 4, "neighbours": 2, "graph_neighbours": 2}
FIELD = {"name": "keyframes", "base": NODES, "bodies": 3}
SECOND = jnp.arange(8) >= 6


@pytest.fixture(scope="module")
def splats():
    rng = np.random.default_rng(0)
    return Splats.from_points(rng.uniform(-0.5, 0.5, (8, 3)), rng.random((8, 3)), scale=0.1)


def visible(field, params, splats, t):
    opacities = jax.nn.sigmoid(field.apply(params, splats, t).opacity_logits)
    return np.asarray(opacities > 1e-6)


@pytest.fixture(scope="module")
def two(splats):
    field = build(FIELD)
    params = field.init(jax.random.key(0), splats)
    return field, field.with_body(params, splats, SECOND, 0.4, 0.6, key=jax.random.key(1))


@pytest.mark.parametrize(
    ("t", "second"), [(0, 0), (0.39, 0), (0.4, 1), (0.59, 1), (0.6, 0), (1, 0)]
)
def test_exactly_one_body_is_visible(two, splats, t, second):
    field, params = two
    np.testing.assert_array_equal(visible(field, params, splats, t), np.asarray(SECOND) == second)


def test_turns_are_listed_cut_and_resumed(two, splats):
    field, params = two
    assert field.turns_of(params) == [(0.0, 0), (pytest.approx(0.4), 1), (pytest.approx(0.6), 0)]
    third = jnp.arange(8) == 0
    params = field.with_body(params, splats, third, 0.5, 2.0, key=jax.random.key(2))
    turns = field.turns_of(params)
    assert [body for _, body in turns] == [0, 1, 2] and turns[2][0] == 0.5
    np.testing.assert_array_equal(visible(field, params, splats, 0.9), third)
    with pytest.raises(ValueError, match="All 3 bodies are taken"):
        field.with_body(params, splats, third, 0.1, 0.2, key=jax.random.key(2))


def test_a_turn_needs_some_time(two, splats):
    field, params = two
    with pytest.raises(ValueError, match=r"end after it begins: 0.7 to 0.7"):
        field.with_body(params, splats, SECOND, 0.7, 0.7, key=jax.random.key(2))


def test_every_body_has_nodes_and_a_motion_of_its_own(two, splats):
    field, params = two
    places = np.asarray(params["base"]["nodes"]["positions"])
    own = np.asarray(splats.means)[np.asarray(SECOND)]
    assert all(np.isclose(own, node).all(axis=-1).any() for node in places[1])

    poses = params["base"]["poses"]
    lifted = poses | {"translations": poses["translations"].at[1, ..., 2].add(0.5)}
    moved = params | {"base": params["base"] | {"poses": lifted}}
    for t, rise in ((0.2, 0.0), (0.5, 0.5)):
        change = np.asarray(field.apply(moved, splats, t).means - splats.means)
        np.testing.assert_allclose(change[:, 2], rise, atol=1e-6)


def test_gradients_reach_the_motion_on_stage_and_nothing_else(two, splats):
    field, params = two
    gradient = jax.grad(lambda p: jnp.sum(field.apply(p, splats, 0.5).means ** 2))(params)
    translations = np.asarray(gradient["base"]["poses"]["translations"])
    assert translations[1].any() and not translations[0].any() and not translations[2].any()
    for name in ("body", "starts", "turns"):
        assert not np.any(np.asarray(gradient[name]))


def test_descendants_belong_to_the_body_of_their_parent(two, splats):
    field, params = two
    params = field.gather(params, jnp.array([7, 1, 2, 3, 4, 5, 6, 0]))
    assert visible(field, params, splats, 0.5).tolist() == [True] + [False] * 5 + [True, False]


def test_regularisers_add_up_over_the_bodies(two):
    field, params = two
    assert float(field.regularization(params)["arap"]) == pytest.approx(0, abs=1e-9)
    noise = jax.random.normal(jax.random.key(3), params["base"]["poses"]["translations"].shape)
    poses = params["base"]["poses"] | {"translations": 0.1 * noise}
    whole = params | {"base": params["base"] | {"poses": poses}}
    alone = [
        field.field.regularization(jax.tree.map(lambda leaf, i=i: leaf[i], whole["base"]))
        for i in range(3)
    ]
    for name, value in field.regularization(whole).items():
        assert float(value) == pytest.approx(sum(float(terms[name]) for terms in alone), rel=1e-5)


def test_peaks_are_those_of_the_own_body(splats):
    field = build({"name": "keyframes", "base": {"name": "lifespan", "base": NODES, "knots": 3}})
    params = field.init(jax.random.key(0), splats)
    assert build(FIELD).peak_opacities(build(FIELD).init(jax.random.key(0), splats), splats) is None
    params = field.with_body(params, splats, SECOND, 0.5, 2.0, key=jax.random.key(1))
    curves = params["base"]["curves"].at[0].set(-2.0).at[1].set(3.0)
    params = params | {"base": params["base"] | {"curves": curves}}
    expected = splats.opacity_logits + jnp.where(SECOND, 3.0, -2.0)
    np.testing.assert_allclose(
        field.peak_opacities(params, splats), jax.nn.sigmoid(expected), rtol=1e-5
    )


def test_keyframes_need_a_body():
    with pytest.raises(ValueError, match="at least 1 body; got 0"):
        build(FIELD | {"bodies": 0})
