"""The binaries `train` and `sample`, run as people run them, on the smoke configuration."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from d4d_jax.models import bundle
from experiments import build, cli, sample
from experiments.configs import tiny

ROOT = pathlib.Path(__file__).parents[1]


def run_binary(name, *arguments):
    """Runs `python -m experiments.NAME` in the project folder."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def run_train(folder, *arguments, cache=None):
    """Trains with the smoke configuration, keeping compiled programs in `cache`."""
    cache = f"--compilation_cache_dir={cache or folder.parent / 'cache'}"
    config = "--config=experiments/configs/tiny.py:smoke"
    return run_binary("train", config, f"--workdir={folder}", cache, *arguments)


def assert_one_sentence(result, code, *parts):
    """The binary ended with `code` and, as the last line, one sentence with all `parts`."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and last[-1] in ".?"
    for part in parts:
        assert part in last


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an exported run of two steps, the model file, and what was printed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    model = folder.parent / "model.npz"
    result = run_train(folder, f"--export={model}")
    assert result.returncode == 0, result.stderr
    return folder, model, result.stderr


def test_training_prints_and_writes_what_it_promises(finished):
    folder, model, printed = finished
    for word in ("Devices: 1 x cpu", "Mesh: data=1, fsdp=1", "Parameters: ", "eta_seconds"):
        assert word in printed
    assert "orbax" not in printed
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and "motion" in line for line in lines)
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 2
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1", "2"]
    params, codec_params, config = bundle.load_bundle(model)
    assert "conv_in" in params and "basis" in codec_params
    assert config["network"]["width"] == 8 and config["data"]["size"] == 16


def test_exported_model_and_run_are_the_same_pipeline(finished):
    folder, model, _ = finished
    exported, trained = sample.load_pipeline(str(model)), sample.load_pipeline(str(folder))
    assert exported.network == trained.network and exported.size == trained.size == 16
    for a, b in zip(jax.tree.leaves(exported.params), jax.tree.leaves(trained.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_exported_model_is_sampled(finished, tmp_path):
    options = [f"--checkpoint={finished[1]}", f"--workdir={tmp_path}", "--steps=1"]
    result = run_binary("sample", *options)
    assert result.returncode == 0, result.stderr
    names = {"orbit.mp4", "static.mp4", "orbit_frames", "sheet.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(list((tmp_path / "orbit_frames").iterdir())) == 24


def test_finished_run_is_not_repeated_then_continued_then_overwritten(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    cache = finished[0].parent / "cache"
    words = ("finished run of 2 steps", "--config.num_steps", "--overwrite")
    assert_one_sentence(run_train(folder), 1, *words)

    result = run_train(folder, "--config.num_steps=3", cache=cache)
    assert result.returncode == 0, result.stderr
    assert "Training from step 2 to 3." in result.stderr
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]

    (folder / "notes.txt").write_text("mine")
    result = run_train(folder, "--overwrite", "--config.num_steps=1", cache=cache)
    assert result.returncode == 0, result.stderr
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1]
    assert lines[0]["loss"] == read_metrics(finished[0])[0]["loss"]
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--config.num_step=3"], 2, "no key 'num_step'; did you mean num_steps?"),
        (["--config.data.path=nowhere"], 1, "nowhere"),
    ],
    ids=["key", "data"],
)
def test_mistakes_of_training_end_in_one_sentence(tmp_path, arguments, code, part):
    assert_one_sentence(run_train(tmp_path / "run", *arguments), code, part)
    assert not (tmp_path / "run" / "config.json").exists()


def test_mistakes_of_sampling_end_in_one_sentence(tmp_path):
    result = run_binary("sample", f"--workdir={tmp_path / 'out'}", "--image=nowhere.png")
    assert_one_sentence(result, 1, "no image 'nowhere.png'")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        sample.load_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not the workdir of a training run"):
        sample.load_pipeline(str(tmp_path / "checkpoints"))


def test_configuration_names_build_objects():
    config = tiny.get_config("smoke").to_dict()
    assert build.build_schedule(config).prediction == "x0"
    network = build.build_network(config, channels=4)
    assert (network.in_channels, network.out_channels, network.width) == (4, 4, 8)
    config["network"]["depth"] = 3
    with pytest.raises(ValueError, match=r"network 'unet'.*depth"):
        build.build_network(config, channels=4)
    config["schedule"]["name"] = "linear"
    with pytest.raises(ValueError, match=r"Unknown schedule 'linear'; known: .*cosine"):
        build.build_schedule(config)


def test_optimizer_warms_up_and_decays():
    config = tiny.get_config().to_dict()
    config["optimizer"] |= {"decay": "linear"}
    with pytest.raises(ValueError, match="decay must be 'cosine' or 'constant'"):
        build.build_optimizer(config)


def test_tiny_configuration_refuses_other_arguments():
    with pytest.raises(ValueError, match="'smoke', not 'large'"):
        tiny.get_config("large")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config=experiments/configs/tiny.py", "--config.network.depth=3"], "no key 'depth'"),
        (["--config=experiments/configs/tiny.py", "--config.num_steps.x=3"], "num_steps.x"),
        (["--config=experiments/configs/tiny.py", "--config.num_steps=many"], "many"),
        (["--config=nowhere.py"], "no configuration file nowhere.py"),
        (["--no_such_flag"], "no_such_flag"),
        (["left", "over"], "'left'"),
    ],
    ids=["key", "path", "value", "file", "flag", "argument"],
)
def test_wrong_flags_exit_with_code_2(arguments, part, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["binary", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli._parse(["binary", *arguments])
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


def test_timesteps_favour_the_noisy_end():
    key = jax.random.key(0)
    even, shifted = (build.draw_timesteps(key, (4000,), 1000, shift) for shift in (1.0, 4.0))
    for steps in (even, shifted):
        assert steps.min() >= 0 and steps.max() <= 999
    assert abs(float((even >= 750).mean()) - 0.25) < 0.03
    # u / (4 - 3 u) = 0.75 at u = 3/7: four sevenths of the draws lie above.
    assert abs(float((shifted >= 750).mean()) - 4 / 7) < 0.03
