"""The binaries `train` and `sample`, run as people run them, on the smoke configuration.

What needs no second process calls `train.run`. The clips are drawn, small and few.
"""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from binaries import ROOT, run_binary
from ml_collections import config_flags

from d4d_jax import clips
from d4d_jax.data import records, synthetic
from d4d_jax.models import bundle
from experiments import build, cli, train
from experiments.configs import tiny


def run_train(root, folder, *arguments):
    """Trains on the clips in ROOT with the smoke configuration."""
    return run_binary(
        "train",
        *("--config", "experiments/configs/tiny.py:smoke", f"--config.data.path={root / 'clips'}"),
        *(f"--workdir={folder}", *arguments),
    )


def smoke_config(root, **changes):
    """The configuration that `run_train` uses, with changes such as `data__size=8`."""
    config = json.loads(tiny.get_config("smoke").to_json())
    for key, value in ({"num_steps": 3, "data__path": str(root / "clips")} | changes).items():
        *parents, name = key.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[name] = value
    return config


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with three clips, an exported run of three steps, and what it printed."""
    root = tmp_path_factory.mktemp("train")
    for i in range(3):
        clips.write_clip(synthetic.make_clip(i, num_frames=4, size=16), root / "clips" / str(i))
    options = ("--config.num_steps=3", "--config.sample_every=3", f"--export={root / 'model.npz'}")
    result = run_train(root, root / "run", *options)
    assert result.returncode == 0, result.stderr
    return root, result.stderr


@pytest.fixture
def copied(finished, tmp_path):
    """The root of the clips, and a copy of the run that a test may change."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return finished[0], tmp_path / "run"


@pytest.fixture
def started(monkeypatch):
    """Lets `train.run` stop where the loop starts; a list of the loop's arguments."""
    calls = []
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(
        train.loop, "train", lambda state, *rest, **named: calls.append((state, named["config"]))
    )
    return calls


@pytest.fixture
def reads(monkeypatch):
    """A list of the clips that are read."""
    paths, read = [], records.read_folder
    monkeypatch.setattr(records, "read_folder", lambda path: paths.append(path) or read(path))
    return paths


def test_training_prints_and_writes_what_it_promises(finished):
    root, printed = finished
    for word in ("Devices: 1 x cpu", "Mesh: data=1, fsdp=1", "Parameters:\n", "eta_seconds"):
        assert word in printed
    assert "orbax" not in printed
    lines = read_metrics(root / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and "motion" in line for line in lines)
    config = json.loads((root / "run" / "config.json").read_text())
    assert config["num_steps"] == 3 and config["data"]["num_frames"] == 4
    assert sorted(p.name for p in (root / "run" / "checkpoints").iterdir())[-2:] == ["2", "3"]
    params, codec_params, exported = bundle.load_bundle(root / "model.npz")
    assert "conv_in" in params and "basis" in codec_params
    assert exported == config


def test_samples_stand_below_the_clips_that_they_animate(finished):
    root, _ = finished
    names = sorted(path.name for path in (root / "run" / "images").iterdir())
    assert names == ["orbit_0_0000003.mp4", "orbit_1_0000003.mp4", "orbits_0000003.png"]
    page = (root / "run" / "samples.html").read_text()
    assert all(f"images/{name}" in page for name in names)
    path = root / "run" / "images" / names[-1]
    sheet = clips.read_image(path)
    assert sheet.shape == (4 * 16, 8 * 16, 3)
    for row, name in ((0, "0"), (2, "1")):
        truth = clips.read_clip(root / "clips" / name).dynamic
        np.testing.assert_allclose(sheet[16 * row :][:16, :16], truth[0], atol=0.01)
        np.testing.assert_allclose(sheet[16 * row :][:16, -16:], truth[-1], atol=0.01)


def test_exported_model_and_run_are_the_same_pipeline(finished):
    root, _ = finished
    exported = build.load_pipeline(str(root / "model.npz"))
    trained = build.load_pipeline(str(root / "run"))
    assert exported.network == trained.network and exported.size == trained.size == 16
    assert exported.num_frames == trained.num_frames == 4
    for a, b in zip(jax.tree.leaves(exported.params), jax.tree.leaves(trained.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_exported_model_is_sampled(finished, tmp_path):
    root, _ = finished
    options = [f"--checkpoint={root / 'model.npz'}"]
    steps = f"--steps={build.SAMPLING_STEPS}"  # compiled already
    result = run_binary("sample", *options, f"--workdir={tmp_path}", steps)
    assert result.returncode == 0, result.stderr
    names = {"orbit.mp4", "static.mp4", "orbit_frames", "sheet.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert clips.read_clip(tmp_path / "orbit_frames").num_frames == 4


def test_stopped_run_continues_as_if_it_had_not_stopped(copied):
    root, folder = copied
    shutil.rmtree(folder / "checkpoints" / "3")  # now it stopped after its second step
    result = run_train(root, folder, "--config.num_steps=4", f"--export={folder / 'model.npz'}")
    assert result.returncode == 0, result.stderr
    assert "Training from step 2 to 4." in result.stderr
    lines, uninterrupted = read_metrics(folder), read_metrics(root / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "denoising", "motion"):
        assert lines[2][name] == uninterrupted[2][name], name  # bitwise
    assert bundle.load_bundle(folder / "model.npz")[2]["num_steps"] == 4


def test_finished_run_is_exported_but_not_repeated(finished, tmp_path):
    root, _ = finished
    with pytest.raises(ValueError, match=r"finished run of 3 steps: raise --config.num_steps .*"):
        train.run(smoke_config(root), root / "run")
    train.run(smoke_config(root), root / "run", export=str(tmp_path / "model.npz"))
    with pytest.raises(FileExistsError, match=r"model.npz exists already"):
        train.run(smoke_config(root), root / "run", export=str(tmp_path / "model.npz"))


def test_continued_run_keeps_its_codec_and_reads_one_clip(copied, started, reads, monkeypatch):
    root, folder = copied
    monkeypatch.setattr(build, "fit_codec", None)
    train.run(smoke_config(root, num_steps=5, log_every=2), folder)
    ((state, config),) = started
    assert int(state.step) == 3 and config["num_steps"] == 5 and config["log_every"] == 2
    assert json.loads((folder / "config.json").read_text()) == config
    assert len(reads) == 1


def test_overwriting_starts_anew_and_deletes_only_the_run(copied, started, reads):
    root, folder = copied
    (folder / "notes.txt").write_text("mine")
    train.run(smoke_config(root, ema_decay=0.5), folder, overwrite=True)
    ((state, config),) = started
    assert int(state.step) == 0 and config["ema_decay"] == 0.5
    names = {"notes.txt", "checkpoints", "config.json", "metrics.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert not list((folder / "checkpoints").iterdir())
    assert sorted(path.name for path in reads) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"data__path": "nowhere"}, "nowhere"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"network__depth": 3}, "depth"),
        ({"schedule__name": "linear"}, "Unknown schedule 'linear'"),
        ({"optimizer__decay": "linear"}, "decay must be"),
    ],
    ids=["loop", "data", "batch", "network", "schedule", "optimizer"],
)
def test_mistaken_overwrite_leaves_the_run_as_it_was(copied, started, changes, words):
    root, folder = copied
    before = files_of(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train.run(smoke_config(root, **changes), folder, overwrite=True)
    assert files_of(folder) == before and not started


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schedule__prediction", "eps", "schedule.prediction='x0', but now it is 'eps'"),
        ("seed", 1, "seed=0, but now it is 1"),
        ("network__head_dim", 4, "network.head_dim=8, but now it is 4"),
        ("loss__omega", 0.5, "loss.omega=0.1, but now it is 0.5"),
        ("optimizer__learning_rate", 0.1, "optimizer.learning_rate=0.00., but now it is 0.1"),
        ("data__size", 8, "data.size=16, but now it is 8"),
        ("network__dim", 8, "network.dim=absent, but now it is 8"),
    ],
)
def test_run_is_not_continued_with_another_configuration(finished, key, value, words):
    root, _ = finished
    before = files_of(root / "run")
    with pytest.raises(ValueError, match=words) as caught:
        train.run(smoke_config(root, num_steps=4, **{key: value}), root / "run")
    assert "--overwrite" in str(caught.value) and "another --workdir" in str(caught.value)
    assert files_of(root / "run") == before


def test_run_is_not_continued_on_clips_of_another_length(finished, tmp_path):
    saved = smoke_config(finished[0], data__num_frames=4)
    with pytest.raises(ValueError, match=r"data\.num_frames=4, but now it is 5"):
        train.check_unchanged(saved, smoke_config(finished[0], data__num_frames=5), tmp_path)
    train.check_unchanged(smoke_config(finished[0]), saved, tmp_path)


def test_runs_of_earlier_versions_can_be_continued_as_they_were(finished, tmp_path):
    now = smoke_config(finished[0], data__num_frames=4)
    earlier = {name: part for name, part in now.items() if name != "init_from"}
    new = ("min_snr_gamma", "noise_offset", "drop_text", "drop_image", "drop_static", "motion")
    earlier["loss"] = {name: value for name, value in now["loss"].items() if name not in new}
    for name in ("lora", "accumulate", "mesh", "writers", "max_skipped", "validate_every"):
        del earlier[name]
    train.check_unchanged(earlier, now, tmp_path)
    with pytest.raises(ValueError, match=r"loss\.min_snr_gamma=0\.0, but now it is 5"):
        now["loss"]["min_snr_gamma"] = 5
        train.check_unchanged(earlier, now, tmp_path)


def test_mistake_of_training_ends_in_one_sentence(tmp_path):
    result = run_train(tmp_path, tmp_path / "run")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"Error: There is no folder of clips '{tmp_path / 'clips'}'."
    assert not (tmp_path / "run").exists()


def test_verbosity_1_shows_where_a_mistake_happened():
    code = "from experiments import cli\ndef main(): raise ValueError('Wrong.')\ncli.run(main)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--verbosity=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Where it happened:\nTraceback" in result.stderr and "in main" in result.stderr
    assert result.stderr.endswith("\nError: Wrong.\n")


def test_mistakes_of_sampling_are_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        build.load_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not the workdir of a training run"):
        build.load_pipeline(str(tmp_path / "checkpoints"))


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


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(("decay", "end"), [("cosine", 0.0), ("constant", 2.0)])
def test_rate_warms_up_to_the_peak_and_decays(decay, end, warmup):
    config = tiny.get_config().to_dict() | {"num_steps": 50}
    config["optimizer"] |= {"decay": decay, "warmup_steps": warmup, "learning_rate": 2.0}
    rate = build.build_rate(config)
    assert float(rate(0)) == (0.0 if warmup else 2.0)
    assert float(rate(warmup // 2)) == (1.0 if warmup else 2.0)
    assert float(rate(warmup)) == 2.0
    assert float(rate(50)) == pytest.approx(end, abs=1e-6)
    middle = float(rate((warmup + 50) // 2))
    assert middle == pytest.approx(1.0 if decay == "cosine" else 2.0)


def test_wrong_rates_are_named():
    config = tiny.get_config().to_dict()
    config["optimizer"]["decay"] = "linear"
    with pytest.raises(ValueError, match="decay must be 'cosine' or 'constant'"):
        build.build_optimizer(config)
    config["optimizer"] |= {"decay": "cosine", "warmup_steps": -1}
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more, not -1"):
        build.build_rate(config)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_lower_a_convex_loss(name):
    config = tiny.get_config("smoke").to_dict()
    config["optimizer"] |= {"name": name, "learning_rate": 0.1}
    optimizer = build.build_optimizer(config)
    params = {"conv": {"kernel": jnp.ones((3, 1, 2, 4)), "bias": jnp.ones(4)}}

    def loss_fn(params):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), loss_fn(params)
    for _ in range(30):
        params, state = step(params, state)
    assert float(loss_fn(params)) < 0.6 * float(before)


def test_unknown_optimizer_is_named():
    config = tiny.get_config().to_dict()
    config["optimizer"]["name"] = "adamm"
    with pytest.raises(ValueError, match="'adamw' or 'muon', not 'adamm'"):
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
        (["--config", "nowhere.py"], "no configuration file nowhere.py"),
        (["--no_such_flag"], "no_such_flag"),
        (["left", "over"], "'left'"),
    ],
    ids=["key", "path", "value", "file", "other_file", "flag", "argument"],
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
