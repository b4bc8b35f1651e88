"""Checkpoints: round trip, refusals, and a process killed in the middle of its saves."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import OPTIMIZER, STEP, ToyData, assert_identical, run_toy, toy_state

from d4d_jax.train import loop
from d4d_jax.train import state as train_state
from d4d_jax.train.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints 10 and 20 of a toy run, and the final state."""
    directory = tmp_path_factory.mktemp("run")
    return directory, run_toy(directory, 20)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of those checkpoints that a test may damage."""
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_restore_returns_the_saved_state_and_data_position(finished):
    directory, final = finished
    data, checkpointer = ToyData(), Checkpointer(directory / "checkpoints")
    restored = checkpointer.restore(toy_state(seed=9), data)
    assert_identical(restored, final)
    assert data.position == 20
    earlier = checkpointer.restore(toy_state(), data, step=10)
    assert int(earlier.step) == 10 and data.position == 10
    assert checkpointer.restore_config() == {"num_steps": 20}
    checkpointer.close()


def test_model_restores_without_a_template(finished):
    directory, final = finished
    checkpointer = Checkpointer(directory / "checkpoints")
    ema, frozen = checkpointer.restore_model()
    checkpointer.close()
    assert_identical(ema, final.ema)
    assert_identical(frozen, final.frozen)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_toy(tmp_path, 12, checkpoint_every=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["12", "9"]


def test_saving_a_step_twice_leaves_the_first(copied):
    checkpointer = Checkpointer(copied)
    state = checkpointer.restore(toy_state(), ToyData())
    checkpointer.save(state, ToyData(), {"other": 1})
    checkpointer.wait()
    assert checkpointer.restore_config() == {"num_steps": 20}
    checkpointer.close()


def test_position_in_bytes_survives(tmp_path):
    class BytesData(ToyData):
        def get_state(self):
            return b"\x00position\xff"

        def set_state(self, state):
            self.position = state

    checkpointer, data = Checkpointer(tmp_path), BytesData()
    checkpointer.save(toy_state(), data, {})
    checkpointer.restore(toy_state(), data)
    checkpointer.close()
    assert data.position == b"\x00position\xff"


def test_missing_checkpoint_is_named(tmp_path, copied):
    empty, full = Checkpointer(tmp_path / "empty"), Checkpointer(copied)
    assert empty.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*empty"):
        empty.restore(toy_state(), ToyData())
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 11"):
        full.restore_model(step=11)
    empty.close()
    full.close()


def test_damaged_checkpoint_is_named_and_the_earlier_one_works(copied):
    for path in (copied / "20").rglob("*"):
        if path.is_file() and path.name != "_CHECKPOINT_METADATA":
            path.write_bytes(b"damaged")
    checkpointer = Checkpointer(copied)
    with pytest.raises(
        ValueError, match=r"20 cannot be read .* delete that folder to continue from step 10"
    ):
        checkpointer.restore(toy_state(), ToyData())
    with pytest.raises(ValueError, match="20 cannot be read"):
        checkpointer.restore_model()
    checkpointer.close()
    shutil.rmtree(copied / "20")
    checkpointer = Checkpointer(copied)
    assert int(checkpointer.restore(toy_state(), ToyData()).step) == 10
    checkpointer.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(13, "Permission denied", "somewhere"), PermissionError),
        (MemoryError(), MemoryError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError),
        (ValueError("PERMISSION_DENIED: reading a file"), OSError),
    ],
    ids=["permission", "memory", "device", "store"],
)
def test_machine_errors_do_not_advise_to_delete(finished, monkeypatch, error, kind):
    def fail(*arguments, **keywords):
        raise error

    checkpointer = Checkpointer(finished[0] / "checkpoints")
    monkeypatch.setattr(checkpointer._manager, "restore", fail)
    for read in (checkpointer.restore_model, checkpointer.restore_config):
        with pytest.raises(kind) as caught:
            read()
        assert "delete" not in str(caught.value)
    checkpointer.close()


def test_checkpoint_of_another_network_is_refused(copied):
    params = {"w": jnp.zeros((4, 1)), "b": jnp.zeros((1,))}
    other = train_state.create_state(params, OPTIMIZER, jax.random.key(0), {"scale": jnp.ones(())})
    checkpointer = Checkpointer(copied)
    with pytest.raises(ValueError, match=r"ema/w has shape \(3, 1\) there and \(4, 1\) here"):
        checkpointer.restore(other, ToyData())
    checkpointer.close()


#: Runs the toy in a child process for every line that it reads, since imports take long. Only the
#: children start JAX, which does not live through a fork.
KILLED_SCRIPT = """
import os, pathlib, sys
sys.path.insert(0, "tests")
from d4d_jax.train import checkpoint, loop, step, writers
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        import toy_run
        toy_run.run_toy(pathlib.Path(sys.argv[1]), 100_000, checkpoint_every=1)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def steps_on_disk(folder):
    """The steps of complete checkpoints."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def is_saving(folder):
    return any("tmp" in path.name for path in folder.iterdir())


def test_run_killed_at_twenty_moments_continues_from_complete_checkpoints(tmp_path):
    """It saves after every step, so that most kills fall into a save; the first one surely."""
    folder = tmp_path / "checkpoints"
    server = subprocess.Popen(
        [sys.executable, "-c", KILLED_SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    rng = np.random.default_rng(0)
    expected, replay, before = toy_state(), ToyData(), 0
    for kill in range(20):
        server.stdin.write("run\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        deadline = time.monotonic() + 60
        while not folder.exists() or max(steps_on_disk(folder), default=0) < before + 1:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if kill == 0:
            while not is_saving(folder):
                assert time.monotonic() < deadline
        else:
            time.sleep(rng.uniform(0, 0.3))
        finished = max(steps_on_disk(folder))
        os.kill(child, signal.SIGKILL)
        data, checkpointer = ToyData(), Checkpointer(folder)
        step = checkpointer.latest_step()
        assert step >= finished > before
        restored = checkpointer.restore(toy_state(), data)
        checkpointer.close()
        while int(expected.step) < step:
            expected, _ = STEP(expected, next(replay))
        assert_identical(restored, expected)
        assert data.position == step
        before = step
    server.stdin.close()
    server.wait()
    assert int(run_toy(tmp_path, before + 2).step) == before + 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [int(line.split('"step": ')[1].split(",")[0]) for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == before + 2


FULL_DISK_SCRIPT = """
import pathlib, resource, sys
sys.path.insert(0, "tests")
import toy_run
state = toy_run.run_toy(pathlib.Path(sys.argv[1]), 2, checkpoint_every=1)
state, _ = toy_run.STEP(state, next(toy_run.ToyData()))
checkpointer = toy_run.Checkpointer(pathlib.Path(sys.argv[1]) / "checkpoints")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a full disk: writes fail
try:
    checkpointer.save(state, toy_run.ToyData(), {})
    checkpointer.wait()
except OSError as error:
    print(error)
"""


def test_full_disk_is_one_sentence_and_the_earlier_checkpoints_stay(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK_SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(
        r"cannot be written to .*checkpoints \(.*File too large.*\): the newest there is 2",
        result.stdout,
    )
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert int(checkpointer.restore(toy_state(), ToyData()).step) == 2
    checkpointer.close()


def test_best_checkpoints_stay_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1, keep_best=2)
    state, data = toy_state(), ToyData()
    for loss in (0.5, 0.1, 0.9, 0.2, 0.8):
        state, _ = STEP(state, next(data))
        checkpointer.save(state, data, {}, metrics={"val_denoising": loss})
    checkpointer.wait()
    assert sorted(steps_on_disk(tmp_path)) == [2, 4, 5]
    checkpointer.close()
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_a_stopped_run_saves_first_and_continues_bitwise(tmp_path):
    asked = iter([False] * 6 + [True])
    with pytest.raises(loop.Interrupted, match="Stopped after step 7 of 20"):
        run_toy(tmp_path / "parts", 20, hooks={"stop": lambda: next(asked)})
    assert steps_on_disk(tmp_path / "parts" / "checkpoints") == [7]
    assert_identical(run_toy(tmp_path / "parts", 20), run_toy(tmp_path / "whole", 20))
