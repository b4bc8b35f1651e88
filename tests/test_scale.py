"""A run on one device, on eight, and in two processes: the same losses, one kind of checkpoint.

Everything runs as people run it: the binary, its log, its metrics and its checkpoints.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from binaries import ROOT
from toy_run import assert_identical

from d4d_jax import clips, conversion
from d4d_jax.data import synthetic
from d4d_jax.train.checkpoint import Checkpointer

STEPS = 20
FIGURES = ("loss", "grad_norm", "denoising", "motion", "val_denoising")


def start(root, name, *arguments, devices=1):
    """Starts `experiments.train` on that many devices, on the clips in ROOT."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [
        *(sys.executable, "-m", "experiments.train"),
        *("--config=experiments/configs/tiny.py:smoke", f"--config.data.path={root / 'clips'}"),
        *(f"--config.data.validation={root / 'clips'}", "--config.batch_size=8"),
        *("--config.network.width=32", "--config.validate_every=10"),
        *("--config.checkpoint_every=10", f"--workdir={root / name}", *arguments),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def run_pair(root, name, *arguments):
    """Two processes with two devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [
        start(
            *(root, name, "--distributed", f"--coordinator=localhost:{port}"),
            *("--num_processes=2", f"--process_id={i}", *arguments),
            devices=2,
        )
        for i in range(2)
    ]
    return [finish(process) for process in pair]


def figures(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], k): v for line in lines for k, v in line.items() if k in FIGURES}


def assert_close(found, expected):
    assert found.keys() == expected.keys() and len(found) > STEPS
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def megabytes(printed):
    return float(re.search(r"The state takes ([\d.]+) MB", printed)[1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with clips and a run on one device, and what that printed."""
    root = tmp_path_factory.mktemp("scale")
    for i in range(8):
        clips.write_clip(synthetic.make_clip(i, num_frames=8, size=16), root / "clips" / str(i))
    return root, finish(start(root, "one", f"--config.num_steps={STEPS}"))


def test_eight_devices_with_split_parameters_give_the_losses_of_one(one):
    root, printed = one
    arguments = (f"--config.num_steps={STEPS}", "--config.mesh.fsdp=4")
    eight = finish(start(root, "eight", *arguments, devices=8))
    assert "Mesh: data=2, fsdp=4." in eight
    assert megabytes(eight) < 0.45 * megabytes(printed)  # vectors and small kernels are copied
    assert_close(figures(root / "eight"), figures(root / "one"))


def test_frames_over_devices_and_batches_in_parts_give_the_losses_of_one(one):
    root, _ = one
    arguments = ("--config.mesh.fsdp=4", "--config.mesh.by_frames", "--config.accumulate=2")
    finish(start(root, "frames", f"--config.num_steps={STEPS}", *arguments, devices=8))
    assert_close(figures(root / "frames"), figures(root / "one"))


def test_two_processes_train_as_one_and_share_checkpoints_with_it(one, tmp_path):
    root, _ = one
    arguments = (f"--config.num_steps={STEPS}", "--config.mesh.fsdp=2")
    first, second = run_pair(root, "pair", *arguments, f"--export={tmp_path / 'pair'}")
    assert f"[{STEPS}] " in first and f"[{STEPS}] " not in second  # one of them reports
    assert_close(figures(root / "pair"), figures(root / "one"))
    assert_exported(tmp_path / "pair", root / "pair")
    # What one process wrote is read by two, and what two wrote is continued by one.
    shutil.copytree(root / "one", root / "copy")
    run_pair(root, "copy", *arguments, f"--export={tmp_path / 'copy'}")
    assert_exported(tmp_path / "copy", root / "one")
    printed = finish(start(root, "pair", f"--config.num_steps={STEPS + 1}"))
    assert f"Training from step {STEPS} to {STEPS + 1}." in printed


def assert_exported(model, workdir):
    """A model folder has, bit by bit, what is read from a run's checkpoint on one device."""
    checkpointer = Checkpointer(workdir / "checkpoints")
    ema, _ = checkpointer.restore_model()
    checkpointer.close()
    assert_identical(conversion.load(model / "network.safetensors"), ema)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.batch_size=6"], "A batch of 6 clips cannot be split over 4 devices"),
        (["--config.accumulate=4"], "over 4 devices in 4 steps: .* a multiple of 16"),
        (["--config.mesh.fsdp=3"], "data=1 x fsdp=3 does not cover the 4 visible devices"),
    ],
)
def test_batches_that_do_not_divide_are_refused_before_anything_is_built(one, arguments, sentence):
    root, _ = one
    process = start(root, "refused", *arguments, devices=4)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and re.search(f"Error: .*{sentence}", printed), printed
    assert not (root / "refused").exists()
