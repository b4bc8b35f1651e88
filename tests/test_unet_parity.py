"""Both video UNets against diffusers, with nothing left at its initial value."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_unet_variants_golden as golden

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def data():
    return dict(np.load(golden.PATH))


@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: golden.name_of(*case))
def test_outputs_agree(data, case):
    variant, camera, shape = case
    model, params, inputs = golden.build(variant, shape, camera)
    expected = data[golden.name_of(*case)]
    found = jax.jit(model.apply)({"params": params}, *inputs)
    assert 0.2 < expected.std() < 2
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("variant", ["videomv_t2v", "videomv_i2v"])
def test_gradients_agree(data, variant):
    model, params, inputs = golden.build(variant, golden.SMALL, camera=False)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            return jnp.sum(jnp.sin(model.apply({"params": params}, x, *inputs[1:])))

        return jax.grad(loss, argnums=(0, 1))(params, x)

    of_params, of_x = gradients(params, inputs[0])
    ours = {
        "/".join(re.findall(r"\['(\w+)'\]", jax.tree_util.keystr(path))): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(of_params)
    } | {"x": of_x}
    orders = {name: axes for name, (_, axes) in golden.WEIGHTS.items()} | {"x": None}
    for name, order in orders.items():
        theirs = data[f"{variant}/gradient/{name}"]
        if order == ():  # (o, i, 3, 1, 1) here is (3, 1, i, o)
            theirs = theirs[..., 0].transpose(2, 3, 1, 0)
        elif order is not None:
            theirs = theirs.transpose(order)
        error = np.linalg.norm(np.asarray(ours[name]) - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3
