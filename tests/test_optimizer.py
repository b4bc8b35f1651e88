"""Groups of parameters: frozen ones, rates, and the sentences for wrong tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d4d_jax.train.optimizer import group_labels, learning_rate, make_optimizer

PARAMS = {
    "temporal": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "spatial": {"kernel": jnp.ones((3, 4))},
}
RATE = learning_rate(0.1, num_steps=10)


def after(groups, name="adamw", gradient=1.0, steps=3):
    optimizer = make_optimizer(name, RATE, groups=groups)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_the_others_move(name):
    params, state = after([("temporal", {}), ("", {"frozen": True})], name)
    np.testing.assert_array_equal(params["spatial"]["kernel"], 1.0)
    assert (jnp.abs(params["temporal"]["kernel"] - 1) > 0.01).all()
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    assert held <= 2 * 12  # both moments of the one kernel that is trained


def test_frozen_parameters_do_not_count_in_the_clipping():
    """AdamW's step does not depend on the gradient's scale, plain momentum's state does."""
    groups = [("temporal", {}), ("", {"frozen": True})]
    _, state = after(groups, gradient=10.0, steps=1)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3, 4)]
    norm = np.sqrt(16)  # of ones in the temporal kernel and bias
    np.testing.assert_allclose(moments[0], 0.1 / norm, rtol=1e-5)


def test_rates_of_groups_are_factors():
    one, _ = after([("temporal", {"rate": 0.5}), ("", {})], steps=1)
    moved = jax.tree.map(lambda x: float(1 - x.mean()), one)
    assert moved["temporal"]["kernel"] == pytest.approx(0.5 * moved["spatial"]["kernel"], rel=1e-4)


def test_a_group_of_all_is_no_group():
    for name in ("adamw", "muon"):
        plain, _ = after((), name)
        grouped, _ = after([("", {})], name)
        jax.tree.map(np.testing.assert_array_equal, plain, grouped)


def test_wrong_tables_are_named():
    with pytest.raises(ValueError, match="'spatial/kernel' is in none of the groups"):
        group_labels(PARAMS, [("temporal", {})])
    with pytest.raises(ValueError, match="No parameter is in the group 'camera'"):
        group_labels(PARAMS, [("camera", {}), ("", {})])
    with pytest.raises(ValueError, match="'rate' and 'frozen', not 'lr'"):
        make_optimizer("adamw", RATE, groups=[("", {"lr": 1.0})])
