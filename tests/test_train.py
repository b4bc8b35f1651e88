"""State, step, sharding and loop, on a toy regression."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import OPTIMIZER, STEP, ToyData, assert_identical, run_toy, toy_loss, toy_state

from d4d_jax.train import loop, sharding
from d4d_jax.train import state as train_state
from d4d_jax.train import step as train_step
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.writers import JsonlWriter

ROOT = pathlib.Path(__file__).parents[1]


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_state_counts_parameters_and_starts_average_at_them():
    state = toy_state()
    assert train_state.count_parameters(state.params) == 4
    assert_identical(state.params, state.ema)
    assert int(state.step) == 0


def test_training_lowers_the_loss_and_writes_metrics(tmp_path):
    state = run_toy(tmp_path, 60)
    lines = read_metrics(tmp_path)
    assert int(state.step) == 60
    assert [line["step"] for line in lines] == [1, *range(5, 61, 5)]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    assert {"loss", "grad_norm", "error", "steps_per_second", "eta_seconds"} <= set(lines[-1])
    assert lines[-1]["eta_seconds"] == 0


def test_interrupted_run_equals_uninterrupted_run_bitwise(tmp_path):
    whole = run_toy(tmp_path / "whole", 20)
    run_toy(tmp_path / "parts", 7, checkpoint_every=7)
    resumed = run_toy(tmp_path / "parts", 20)
    assert_identical(whole, resumed)


def test_average_follows_its_formula():
    data, state = ToyData(), toy_state()
    expected = jax.tree.map(np.asarray, state.params)
    for count in range(4):
        state, _ = STEP(state, next(data))
        decay = min(0.9, (1 + count) / (10 + count))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), expected, state.params
        )
    for name in expected:
        np.testing.assert_allclose(state.ema[name], expected[name], rtol=1e-5, atol=1e-7)
    assert float(train_step.ema_decay_at(jnp.int32(100_000), 0.9)) == pytest.approx(0.9)


def test_step_leaves_frozen_arrays_and_key_alone():
    before = toy_state(seed=3)
    after, _ = STEP(toy_state(seed=3), next(ToyData()))
    assert float(after.frozen["scale"]) == 1.0
    assert jnp.array_equal(jax.random.key_data(after.key), jax.random.key_data(before.key))


def test_step_on_a_cpu_does_not_compute_all_branches_at_once():
    """Eight independent terms, each with intermediate values of 1 MB."""

    def loss(params, frozen, batch, key):
        terms = [jnp.tanh(jnp.sort(batch * weight, -1)) ** 2 for weight in params]
        return sum(term.mean() for term in terms), {}

    state = jax.eval_shape(
        lambda: train_state.create_state([jnp.ones(())] * 8, OPTIMIZER, jax.random.key(0))
    )
    batch = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    compiled = train_step.make_train_step(loss, OPTIMIZER).lower(state, batch).compile()
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    plain = gradient.lower(state.params, None, batch, None).compile()
    least, most = (x.memory_analysis().temp_size_in_bytes for x in (compiled, plain))
    assert least < 0.6 * most


def test_bad_decay_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        train_step.make_train_step(toy_loss, OPTIMIZER, ema_decay=1.0)


def restored_from(tmp_path, step):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.latest_step() == step
    restored = checkpointer.restore(toy_state(), ToyData())
    checkpointer.close()
    return restored


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, caplog):
    """The run goes on as if it had not seen that batch; of its steps only the number is counted."""
    state = run_toy(tmp_path, 20, data=ToyData(poison_at=(12,)), log_every=1)
    assert "The update of step 13 is not made: the loss is nan" in caplog.text
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert lines[12]["skipped"] == 0 and lines[13]["skipped"] == lines[20]["skipped"] == 1
    assert "loss" not in lines[13] and np.isfinite(lines[14]["loss"])
    assert int(state.step) == 20
    expected, data = toy_state(), ToyData()
    for step in range(20):
        batch = next(data)
        if step == 12:
            expected = dataclasses.replace(expected, step=expected.step + 1)
        else:
            expected, _ = STEP(expected, batch)
    assert_identical(state, expected)


def test_too_many_skipped_updates_stop_the_run_and_are_not_saved(tmp_path):
    words = r"steps 13 to 15 could not be made.*checkpoints in .* the last good one is 10"
    with pytest.raises(FloatingPointError, match=words):
        run_toy(tmp_path, 40, data=ToyData(poison_at=range(12, 40)), max_skipped=3)
    restored = restored_from(tmp_path, 10)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))
    with pytest.raises(FloatingPointError, match=r"steps 1 to 2 .* there is none yet"):
        run_toy(tmp_path / "new", 9, data=ToyData(poison_at=range(9)), max_skipped=2)


def test_a_gradient_that_is_not_finite_skips_its_update(tmp_path):
    step_fn = train_step.make_train_step(gated_loss, OPTIMIZER)
    state = run_toy(tmp_path, 20, data=GatedData(), step_fn=step_fn)
    assert read_metrics(tmp_path)[-1]["skipped"] == 1
    for tree in (state.params, state.ema):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


class GatedData(ToyData):
    """Batches with a gate of 1, and of 0 at step 10."""

    def __next__(self):
        batch = super().__next__()
        return batch | {"gate": np.full(8, float(self.position != 10), np.float32)}


def gated_loss(params, frozen, batch, key):
    """The toy loss plus sqrt(gate ...): at a gate of 0 its value is 0 and its gradient NaN."""
    loss, metrics = toy_loss(params, frozen, batch, key)
    gate = batch["gate"].mean() * (1 + jnp.sum(jnp.square(params["w"])))
    return loss + jnp.sqrt(gate), metrics


def overflowing_step(state, batch):
    """The toy step, whose parameters overflow at step 10 with sound metrics."""
    state, metrics = STEP(state, batch)
    worse = {"w": state.params["w"] * jnp.inf, "b": state.params["b"]}
    bad = int(state.step) == 10
    return dataclasses.replace(state, params=worse if bad else state.params), metrics


def test_parameters_that_overflow_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="parameters after step 10 are not finite"):
        run_toy(tmp_path, 20, step_fn=overflowing_step, checkpoint_every=5)
    restored = restored_from(tmp_path, 5)
    for tree in (restored.params, restored.ema):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["num_steps", "log_every", "checkpoint_every", "max_skipped"])
def test_loop_options_refuse_zero(name):
    with pytest.raises(ValueError, match=name):
        loop.LoopOptions(**{"num_steps": 3, name: 0})


def test_samples_are_written_at_their_steps(tmp_path):
    data, writer = ToyData(), JsonlWriter(tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    loop.train(
        toy_state(),
        STEP,
        data,
        loop.LoopOptions(4, sample_every=2),
        mesh=sharding.make_mesh(),
        checkpointer=checkpointer,
        writer=writer,
        config={},
        on_sample=lambda state: {
            "sheet": jnp.full((4, 4, 3), 0.5),
            "clip": jnp.full((2, 4, 4, 3), 0.5),
        },
    )
    checkpointer.close()
    names = {path.name for path in (tmp_path / "images").iterdir()}
    steps = ("0000002", "0000004")
    assert names == {f"{name}_{s}.{end}" for s in steps for name, end in KINDS}
    page = (tmp_path / "samples.html").read_text()
    assert page.index("Step 4") < page.index("Step 2") and page.count("<video") == 2


KINDS = (("sheet", "png"), ("clip", "mp4"))


def test_mesh_must_cover_the_devices():
    with pytest.raises(ValueError, match="does not cover"):
        sharding.make_mesh(data=jax.device_count() + 1)


DEVICES_SCRIPT = """
import sys, jax, jax.numpy as jnp
sys.path.insert(0, "tests")
import test_train
from d4d_jax.train import sharding
print(jax.device_count(), *test_train.first_losses())
try:
    sharding.place_batch({"x": jnp.zeros((3, 1))}, sharding.make_mesh())
except ValueError as error:
    print(error)
"""


def first_losses():
    """The losses of five toy steps on all devices."""
    mesh = sharding.make_mesh()
    state, data, losses = sharding.place_state(toy_state(), mesh), ToyData(), []
    for _ in range(5):
        batch = sharding.place_batch(next(data), mesh)
        assert len(batch["x"].sharding.device_set) == jax.device_count()
        state, metrics = STEP(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_eight_devices_give_the_losses_of_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", DEVICES_SCRIPT],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=True,
    )
    losses, refused = result.stdout.splitlines()
    count, *eight = losses.split()
    assert count == "8"
    np.testing.assert_allclose(np.array(eight, float), first_losses(), rtol=1e-5)
    assert "'x' of shape (3, 1) cannot be split into 8 parts along data x fsdp" in refused
