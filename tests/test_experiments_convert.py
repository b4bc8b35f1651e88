"""The binary that converts weights, run as people run it."""

import json

import jax
import numpy as np
import pytest
import torch_archive
import videomv_names
from binaries import run_binary
from conversion_cases import assert_same, draw, draw_leaves
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file
from toy_run import run_toy

from d4d_jax import conversion
from d4d_jax.models import bundle
from d4d_jax.models.autoencoder_kl import VARIANTS, AutoencoderKL

TINY = {key: VARIANTS["tiny"][key] for key in ("width", "multipliers", "blocks")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of the tiny autoencoder with CompVis' names, as of `torch.save`."""
    state = draw(videomv_names.autoencoder(**TINY))
    path = tmp_path_factory.mktemp("weights") / "vae.ckpt"
    return torch_archive.archive(path, state), state


def convert(*arguments):
    return run_binary("convert", *arguments, "--variant=tiny")


def test_there_and_back(source, tmp_path):
    path, state = source
    own, folder = tmp_path / "vae.safetensors", tmp_path / "vae"
    result = convert(f"--source={path}", "--format=compvis_vae", f"--target={own}")
    assert result.returncode == 0, result.stderr
    count = sum(array.size for array in state.values())
    assert f"compvis_vae: {len(state)} tensors with {count:,} parameters\n" in result.stdout
    assert f"Wrote {own} in " in result.stderr
    params = conversion.load(own, network=AutoencoderKL(**VARIANTS["tiny"]))
    assert_same(conversion.export(params, "compvis_vae"), state)

    # The file of our own names its variant.
    result = run_binary("convert", f"--source={own}", "--to=diffusers_vae", f"--target={folder}")
    assert result.returncode == 0, result.stderr
    config = json.loads((folder / "config.json").read_text())
    assert config["block_out_channels"] == [16, 32, 32, 32]
    result = convert(
        f"--source={folder}",
        "--format=diffusers_vae",
        "--to=compvis_vae",
        f"--target={tmp_path / 'back.safetensors'}",
    )
    assert result.returncode == 0, result.stderr
    assert_same(load_file(tmp_path / "back.safetensors"), state)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        *("back.safetensors", "vae", "vae.safetensors"),
    ]


def test_dry_run_compares_and_writes_nothing(source, tmp_path):
    _, state = source
    extra = tmp_path / "more.safetensors"
    save_file(state | {"loss.logvar": np.zeros(1, np.float32)}, extra)
    arguments = ("--format=compvis_vae", "--to=diffusers_vae", "--dry_run")
    result = convert(f"--source={extra}", *arguments, f"--target={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "1 not used: loss.logvar" in result.stdout
    assert "Everything fits" in result.stderr and not (tmp_path / "out").exists()


def test_everything_that_does_not_fit_is_listed(source, tmp_path):
    path = tmp_path / "wrong.safetensors"
    wrong = {f"what.{i}": np.zeros(2, np.float32) for i in range(40)}
    save_file(source[1] | wrong, path)
    target = tmp_path / "out.safetensors"
    result = convert(f"--source={path}", "--format=compvis_vae", f"--target={target}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert all(f"what.{i} (2) is unknown" in result.stdout.splitlines() for i in range(40))
    assert result.stderr.endswith(f"Error: {path} does not fit: 40 problems, listed above.\n")
    assert not target.exists()


def test_model_files_are_sources(tmp_path):
    params = unflatten_dict(draw_leaves(AutoencoderKL(**VARIANTS["tiny"])), sep="/")
    bundle.save_bundle(tmp_path / "model.npz", params, {}, {})
    target = tmp_path / "out"
    result = run_binary("convert", f"--source={tmp_path / 'model.npz'}", f"--target={target}")
    assert result.returncode == 0, result.stderr
    assert_same(conversion.load(target), bundle.load_bundle(tmp_path / "model.npz")[0])


def test_training_runs_are_sources(tmp_path):
    state = run_toy(tmp_path / "run", 3)
    target = tmp_path / "out.safetensors"
    result = run_binary("convert", f"--source={tmp_path / 'run'}", f"--target={target}")
    assert result.returncode == 0, result.stderr
    assert_same(load_file(target), jax.tree.map(np.asarray, state.ema))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--source=absent.pth", "--dry_run"], 1, "There is no file or folder absent.pth."),
        (["--source={0}"], 1, "There is no --target"),
        (["--source={0}", "--target={0}"], 1, "choose another target, or pass overwrite"),
        (["--source={0}", "--target={1}/a.h5"], 1, "none of the endings .safetensors"),
        (["--source={0}", "--target={1}/a", "--format=sd"], 2, "format"),
        (["--source={0}", "--target={1}/a", "--variant=huge"], 1, "no variant 'huge'; known: sd"),
    ],
    ids=["source", "target", "exists", "ending", "format", "variant"],
)
def test_mistakes_end_in_one_sentence(source, tmp_path, arguments, code, words):
    given = [argument.format(source[0], tmp_path) for argument in arguments]
    default = [] if any("--format" in argument for argument in given) else ["--format=compvis_vae"]
    result = run_binary("convert", *default, *given)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert words in result.stderr and not list(tmp_path.iterdir())
