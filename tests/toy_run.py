"""A toy training run (linear regression, compiles in a moment) for the tests of `train`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d4d_jax.train import loop, sharding
from d4d_jax.train import state as train_state
from d4d_jax.train import step as train_step
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.writers import JsonlWriter


def toy_loss(params, frozen, batch, key):
    """Linear regression with a little noise on the inputs, so that the random key matters."""
    inputs = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    error = inputs @ params["w"] + params["b"] - batch["y"] * frozen["scale"]
    return jnp.mean(jnp.square(error)), {"error": jnp.mean(jnp.abs(error))}


class ToyData:
    """Endless batches that depend on the position only, as a seeded grain pipeline's do."""

    def __init__(self, batch_size=8, poison_at=()):
        self.position, self.batch_size, self.poison_at = 0, batch_size, poison_at

    def __next__(self):
        rng = np.random.default_rng(self.position)
        x = rng.normal(size=(self.batch_size, 3)).astype(np.float32)
        y = x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.25
        if self.position in self.poison_at:
            y = y * np.nan
        self.position += 1
        return {"x": x, "y": y.astype(np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


OPTIMIZER = optax.adam(0.05)
STEP = train_step.make_train_step(toy_loss, OPTIMIZER, ema_decay=0.9)


def toy_state(seed=0):
    params = {"w": jnp.zeros((3, 1)), "b": jnp.zeros((1,))}
    frozen = {"scale": jnp.ones(())}
    return train_state.create_state(params, OPTIMIZER, jax.random.key(seed), frozen)


def run_toy(directory, num_steps, *, data=None, state=None, step_fn=STEP, hooks=None, **options):
    """Runs the loop in a folder, from its newest checkpoint if it has one."""
    hooks = hooks or {}
    data = data or ToyData()
    checkpointer = Checkpointer(directory / "checkpoints")
    state = state or toy_state()
    if checkpointer.latest_step() is not None:
        state = checkpointer.restore(state, data)
    writer = JsonlWriter(directory, restored_step=int(state.step))
    try:
        return loop.train(
            state,
            step_fn,
            data,
            loop.LoopOptions(num_steps, **{"log_every": 5, "checkpoint_every": 10, **options}),
            mesh=sharding.make_mesh(),
            checkpointer=checkpointer,
            writer=writer,
            config={"num_steps": num_steps},
            **hooks,
        )
    finally:
        writer.close()
        checkpointer.close()


def assert_identical(left, right):
    left, right = (t if isinstance(t, dict) else vars(t) for t in (left, right))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
