"""Low-rank adapters: nothing at the start, a low-rank change after, and one network when merged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_unet import SMALL, example

from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.train import lora
from d4d_jax.train.sharding import path_name


@pytest.fixture(scope="module")
def network():
    model = SpatioTemporalUNet(**SMALL)
    inputs = example(SMALL)
    return model, inputs, model.init(jax.random.key(0), *inputs)["params"]


def test_default_pattern_finds_the_projections_of_every_attention(network):
    _, _, params = network
    adapters = lora.init(params, lora.ATTENTION, rank=2, key=jax.random.key(1))
    named = {path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
    expected = {
        name
        for name in named
        if "/attention_" in name and name.split("/")[-2] in ("query", "key", "value", "out")
    }
    assert set(adapters) == {name for name in expected if name.endswith("kernel")} != set()


def test_training_adapters_leaves_the_base_and_changes_each_kernel_by_a_low_rank(network):
    model, inputs, params = network
    adapters = lora.init(params, lora.ATTENTION, rank=2, key=jax.random.key(1))
    start = lora.merge(params, adapters, alpha=4.0)
    jax.tree.map(np.testing.assert_array_equal, start, params)

    def loss_fn(params, frozen, batch, key):
        # conv_out starts at 0 and would hide all gradients.
        params = {**params, "conv_out": jax.tree.map(jnp.ones_like, params["conv_out"])}
        params = jax.tree.map(lambda x: x + 0.02, params)
        return jnp.mean(jnp.square(model.apply({"params": params}, *inputs) - 1)), {}

    loss_fn = lora.adapted(loss_fn, alpha=4.0)
    optimizer = optax.adam(1e-2)
    frozen, state = {"base": params}, optimizer.init(adapters)
    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    losses = []
    for _ in range(4):
        (loss, _), gradients = gradient_fn(adapters, frozen, None, jax.random.key(0))
        updates, state = optimizer.update(gradients, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    merged = lora.merge(params, adapters, alpha=4.0)
    for path, leaf in jax.tree.leaves_with_path(merged):
        before = params
        for key in path:
            before = before[key.key]
        change = np.asarray(leaf - before).reshape(-1, leaf.shape[-1])
        if path_name(path) in adapters:
            assert np.linalg.matrix_rank(change, tol=1e-5) in (1, 2)
        else:
            np.testing.assert_array_equal(change, 0)


def test_wrong_adapters_are_named(network):
    _, _, params = network
    with pytest.raises(ValueError, match="No kernel of the network matches 'nowhere'"):
        lora.init(params, "nowhere", rank=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lora.init(params, lora.ATTENTION, rank=0, key=jax.random.key(0))
    adapters = {"elsewhere/kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match="no kernel 'elsewhere/kernel'"):
        lora.merge(params, adapters, alpha=1.0)
