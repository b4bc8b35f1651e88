import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.data import synthetic
from d4d_jax.metrics import load_stlpips
from gaussians.densify import AdaptiveDensity
from gaussians.reconstruct import ReconstructConfig, reconstruct
from gaussians.snapshot import FileKeeper, Interrupted, Snapshot, flatten, restore
from gaussians.stages import Stage

BASE = {
    "name": "hexplane",
    "spatial_resolution": 4,
    "time_resolution": 4,
    "multires": (1,),
    "channels": 4,
    "width": 8,
}
CONFIG = ReconstructConfig(
    num_splats=60,
    capacity=100,
    sh_degree=1,
    sh_interval=3,
    deformation={"name": "lifespan", "knots": 3, "base": BASE},
    warmup=Stage(4, static_fraction=1.0),
    coarse=Stage(6, curriculum=0.8, low_steps=3),
    fine=Stage(6, views=2, static_fraction=0.3),
    tracking={"steps": 0},  # tests/test_tracking.py
    density=AdaptiveDensity(start=3, stop=16, every=4, gradient_threshold=1e-6, reset_every=0),
)


@pytest.fixture(scope="module")
def clip():
    return synthetic.make_clip(0, num_frames=4, size=24)


def leaves(asset):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((asset.splats, asset.params))]


@pytest.fixture(scope="module")
def uninterrupted(clip):
    return leaves(reconstruct(clip, CONFIG, jax.random.key(0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"density": {"name": "mcmc", "start": 3, "stop": 16, "every": 4, "noise_scale": 1e5}},
        {"deformation": {"name": "control_points", "num_nodes": 12, "time_resolution": 4}},
        {
            "deformation": {"name": "control_points", "num_nodes": 12, "time_resolution": 4},
            "nodes": Stage(8, static_fraction=0.3, low_steps=4),
        },
    ],
    ids=["mcmc", "control_points", "node_stage"],
)
def test_every_part_resumes_bit_for_bit(clip, tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    expected = leaves(reconstruct(clip, config, jax.random.key(0)))
    keeper = FileKeeper(tmp_path / "snapshot.npz", stops=Stopper(9))
    with pytest.raises(Interrupted):
        reconstruct(clip, config, jax.random.key(0), keeper=keeper)
    resumed = reconstruct(clip, config, jax.random.key(0), keeper=FileKeeper(keeper.path))
    for one, other in zip(leaves(resumed), expected, strict=True):
        np.testing.assert_array_equal(one, other)


class Stopper:
    """Stops a run after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("steps", [1, 4, 6, 10, 11, 16])  # in and between all stages
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(clip, uninterrupted, tmp_path, steps):
    path = tmp_path / "snapshot.npz"
    keeper = FileKeeper(path, stops=Stopper(steps))
    with pytest.raises(Interrupted, match=f"after step {steps} of 16"):
        reconstruct(clip, CONFIG, jax.random.key(0), keeper=keeper)
    seen = []
    keeper = FileKeeper(path)
    asset = reconstruct(clip, CONFIG, jax.random.key(0), seen.append, keeper=keeper)
    assert [p.step for p in seen] == list(range(steps + 1, 17))
    for one, other in zip(leaves(asset), uninterrupted, strict=True):
        np.testing.assert_array_equal(one, other)
    keeper.discard()
    assert FileKeeper(path).load() is None


def test_snapshots_come_as_often_as_asked_and_change_nothing(clip, uninterrupted):
    class Memory:
        every = 5

        def __init__(self):
            self.steps = []

        def load(self):
            return None

        def save(self, snapshot):
            self.steps.append(snapshot.steps)

        def stops(self):
            return False

    keeper = Memory()
    asset = reconstruct(clip, CONFIG, jax.random.key(0), keeper=keeper)
    assert keeper.steps == [5, 10, 15, 16]
    for one, other in zip(leaves(asset), uninterrupted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(clip, tmp_path):
    broken = dataclasses.replace(clip, dynamic=np.full_like(clip.dynamic, np.nan))
    keeper = FileKeeper(tmp_path / "snapshot.npz")
    with pytest.raises(FloatingPointError, match="at step 0 of the coarse stage"):
        reconstruct(broken, CONFIG, jax.random.key(0), keeper=keeper)
    saved = keeper.load()
    assert saved.steps == CONFIG.warmup.steps
    assert all(np.isfinite(array).all() for array in saved.arrays.values())


@pytest.mark.parametrize("change", ["seed", "config", "clip", "network"])
def test_a_snapshot_of_another_run_is_refused(clip, tmp_path, change):
    path = tmp_path / "snapshot.npz"
    with pytest.raises(Interrupted):
        reconstruct(clip, CONFIG, jax.random.key(0), keeper=FileKeeper(path, stops=Stopper(1)))
    before = path.read_bytes()
    other = {"seed": jax.random.key(1), "config": CONFIG, "clip": clip}
    if change == "config":
        other["config"] = dataclasses.replace(CONFIG, fine=Stage(7))
    if change == "clip":
        other["clip"] = dataclasses.replace(clip, dynamic=1 - np.asarray(clip.dynamic))
    network = load_stlpips() if change == "network" else None
    keeper = FileKeeper(path)
    with pytest.raises(ValueError, match="another clip, configuration or seed"):
        reconstruct(
            other["clip"], other["config"], other["seed"], keeper=keeper, perceptual=network
        )
    assert path.read_bytes() == before


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "snapshot.npz"
    keeper = FileKeeper(path)
    keeper.save(Snapshot("run", 3, 256, {"['x']": np.arange(5.0)}))
    content = path.read_bytes()
    for damaged in (content[:-30], b"", b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not a complete snapshot"):
            keeper.load()
    np.savez(path, json=np.array('{"format": "something else"}'))
    with pytest.raises(ValueError, match="its format is another one"):
        keeper.load()
    with pytest.raises(ValueError, match="at least 1 step between snapshots; got 0"):
        FileKeeper(path, every=0)


def test_a_kill_in_the_middle_of_a_save_leaves_the_snapshot_before(tmp_path):
    path = tmp_path / "snapshot.npz"
    script = f"""
import os, signal, numpy as np
from gaussians import snapshot
keeper = snapshot.FileKeeper({str(path)!r})
keeper.save(snapshot.Snapshot("run", 1, 256, {{"x": np.zeros(10)}}))
def savez(file, **arrays):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
np.savez = savez
keeper.save(snapshot.Snapshot("run", 2, 256, {{"x": np.ones(10)}}))
"""
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ, JAX_PLATFORMS="cpu"))
    assert done.returncode == -signal.SIGKILL
    assert FileKeeper(path).load().steps == 1


def test_restoring_checks_the_structure():
    state = {"a": jnp.arange(3.0), "b": (jnp.array([True, False]),)}
    arrays = flatten(state)
    back = restore(jax.tree.map(jnp.zeros_like, state), arrays)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    for wrong in ({}, arrays | {"['c']": np.zeros(1)}, arrays | {"['a']": np.zeros(4)}):
        with pytest.raises(ValueError, match="another version of the library"):
            restore(state, wrong)
