"""The binary, run as people run it."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import capture_files
import jax
import numpy as np
import plyfile
import pytest
from binaries import ROOT, run_binary
from PIL import Image

from d4d_jax import clips
from d4d_jax.data import synthetic
from experiments import reconstruct as binary
from experiments import results
from experiments.configs import reconstruct as configs
from experiments.curves import read_curve
from gaussians import io
from gaussians.captures import of_clip
from gaussians.deformation import build
from gaussians.deformation.hexplane import HexPlane
from gaussians.evaluation import Rendered, render_views, score
from gaussians.rasterize import chosen
from gaussians.reconstruct import ReconstructConfig

SMOKE = "--config=experiments/configs/reconstruct.py:smoke"


COMMAND = [sys.executable, "-m", "experiments.reconstruct"]
OPTIONS = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}, "text": True}


def run(*arguments):
    return run_binary("reconstruct", *arguments)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clips.write_clip(synthetic.make_clip(0, num_frames=4, size=24), folder)
    return folder


@pytest.fixture(scope="module")
def finished(clip_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("out") / "run"
    formats = ["--export=spz,glb", "--frames=ply"]
    result = run(f"--clip={clip_folder}", f"--workdir={workdir}", SMOKE, *formats)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_writes_all_files(finished):
    workdir, result = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "asset.npz", "point_cloud.ply", "orbit.mp4", "novel.mp4", "comparison.png", "report.json",
        "point_cloud.spz", "point_cloud.glb", "frames", "viewer.html", "depth.mp4", "curves.png",
        "curves.jsonl",
    }  # fmt: skip
    frames = {path.name for path in (workdir / "frames").iterdir()}
    assert frames == {"frames.json", *(f"{i:04}.ply" for i in range(4))}
    report = json.loads((workdir / "report.json").read_text())
    for metric in ("psnr", "ssim", "alpha_iou"):
        assert set(report[metric]) == {"dynamic", "static", "front"}
        assert all(np.isfinite(value) for value in report[metric].values())
    assert report["splats"] > 0 and report["seconds"] > 0 and report["implementation"] == chosen()
    assert Image.open(workdir / "comparison.png").size == (8 * 24, 6 * 24)
    assert "fine 18/18" in result.stderr and "ETA" in result.stderr


def test_the_files_hold_the_same_asset(finished):
    workdir, _ = finished
    asset = io.load_asset(workdir / "asset.npz")
    vertices = plyfile.PlyData.read(workdir / "point_cloud.ply")["vertex"]
    start = asset.at(0.0)
    active = np.asarray(start.active)
    assert len(vertices["x"]) == active.sum()
    np.testing.assert_allclose(vertices["x"], np.asarray(start.means)[active, 0], rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_same_command_goes_on(finished, clip_folder, tmp_path, number):
    arguments = [f"--clip={clip_folder}", f"--workdir={tmp_path}", SMOKE, "--snapshot_every=1"]
    process = subprocess.Popen([*COMMAND, *arguments], **OPTIONS, stderr=subprocess.PIPE)
    while not (tmp_path / "snapshot.npz").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)  # during the warm-up: later stages have yet to be compiled
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    assert re.search("Stopped after step [0-9]+ of 18. The same command goes on", errors), errors
    assert {path.name for path in tmp_path.iterdir()} == {"snapshot.npz", "curves.jsonl"}
    other = run(*arguments, "--seed=1")
    assert other.returncode == 1 and "another clip, configuration or seed" in other.stderr
    assert run(*arguments).returncode == 0
    assert not (tmp_path / "snapshot.npz").exists()
    assert read_curve(tmp_path / "curves.jsonl") == read_curve(finished[0] / "curves.jsonl")
    one, other = io.load_asset(tmp_path / "asset.npz"), io.load_asset(finished[0] / "asset.npz")
    for a, b in zip(*(jax.tree.leaves((x.splats, x.params)) for x in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_overwritten_unless_told(finished, clip_folder):
    workdir, _ = finished
    result = run(f"--clip={clip_folder}", f"--workdir={workdir}", SMOKE)
    assert result.returncode == 1
    assert "already holds asset.npz" in result.stderr and "--overwrite" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistaken_overwrite_costs_nothing(finished):
    workdir, _ = finished
    result = run("--clip=no/such/clip", f"--workdir={workdir}", SMOKE, "--overwrite")
    assert result.returncode == 1
    assert (workdir / "report.json").exists() and (workdir / "asset.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--clip=no/such/clip", "--workdir={tmp}"], 1, "There is no clip folder 'no/such/clip'"),
        (["--clip={clip}", "--workdir={tmp}", SMOKE, "--config.fine.stepz=3"], 2, "stepz"),
        (["--clip={clip}", "--workdir={tmp}", SMOKE, "--config.capacity=3"], 1, "capacity of 3"),
        (["--workdir={tmp}"], 2, "clip"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, code, words, clip_folder, tmp_path):
    result = run(*(text.format(tmp=tmp_path / "out", clip=clip_folder) for text in arguments))
    assert result.returncode == code, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "report.json").exists()


def test_overwriting_is_possible_and_front_frames_may_be_missing(clip_folder, tmp_path):
    clip = clips.read_clip(clip_folder)
    config = configs.get_config("smoke")
    for stage in ("warmup", "coarse", "fine"):
        config[stage].steps = 1
    (tmp_path / "report.json").write_text("{}")
    bare = clips.OrbitClip(clip.camera, clip.timestamps, dynamic=clip.dynamic)
    asset = binary.reconstruct(bare, binary.to_config(config), jax.random.key(0))
    report = results.write_results(asset, of_clip(bare, 0.0), tmp_path, seconds=1.0)
    assert not (tmp_path / "curves.png").exists()  # There is no curve to draw.
    assert report["psnr"]["front"] is None and report["psnr"]["static"] is None
    assert report["front_unseen"] is None and report["psnr"]["dynamic"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_default_configuration_is_the_library_s():
    spelt_out, default = binary.to_config(configs.get_config()), ReconstructConfig()
    assert build(spelt_out.deformation) == build(default.deformation)
    assert dataclasses.replace(spelt_out, deformation=default.deformation) == default
    fast = binary.to_config(configs.get_config("fast"))
    assert fast.capacity < ReconstructConfig().capacity
    quality = binary.to_config(configs.get_config("quality"))
    assert quality.capacity > default.capacity and quality.fine.steps > default.fine.steps
    assert configs.get_config("default") == configs.get_config()
    with pytest.raises(ValueError, match="not 'quick'"):
        configs.get_config("quick")
    with pytest.raises(ValueError, match=r"one preset, not \['smoke', 'fast'\]"):
        configs.get_config("smoke,mcmc,fast")
    hexplane = binary.to_config(configs.get_config("hexplane,smoke")).deformation
    assert build(hexplane).base.base == HexPlane()
    plain = binary.to_config(configs.get_config("plain,hexplane")).deformation
    assert build(plain) == HexPlane()
    assert binary.to_config(configs.get_config("identity")).deformation == {"name": "identity"}
    assert configs.get_config("mcmc,fast") == configs.get_config("fast,mcmc")
    assert configs.get_config("smoke").deformation.base.base.num_nodes == 16
    with pytest.raises(ValueError, match=r"one deformation field, not \['hexplane', 'identity'\]"):
        configs.get_config("hexplane,identity")
    steps = [binary.to_config(configs.get_config(w)) for w in ("no_coarse", "no_fine", "default")]
    assert len({c.coarse.steps + c.fine.steps for c in steps}) == 1
    assert steps[0].coarse.steps == 0 and steps[1].fine.steps == 0
    assert binary.to_config(configs.get_config("dynamic_fine")).fine.static_fraction == 0
    misspelt = configs.get_config()
    misspelt.fine.step = 3
    with pytest.raises(ValueError, match="'step' is no field of Stage; it has steps"):
        binary.to_config(misspelt)


def test_front_frames_that_the_orbit_shows_are_not_unseen():
    """A closed orbit begins and ends at the front camera; the frames between are unseen."""
    clip = synthetic.make_clip(0, num_frames=4, size=24)
    render = clip.front.copy()
    render[[0, 3]] = 0.0
    render[1:3] = np.clip(render[1:3] + 0.1, 0, None)
    capture = of_clip(clip, 0.0)
    unseen = results._front_unseen(capture, Rendered(render, clip.front_alpha))
    assert unseen["psnr"] == pytest.approx(20.0, abs=0.01)
    assert 0 < unseen["hold_still"] < 60
    nothing = Rendered(np.full_like(render, np.nan), clip.front_alpha)
    with pytest.raises(ValueError, match="A score is nan"):
        results._front_unseen(capture, nothing)


def test_other_captures_are_reconstructed_and_evaluated(tmp_path):
    folder, out = tmp_path / "capture", tmp_path / "out"
    times = np.linspace(0, 1, 6)
    sets = {
        "train": (capture_files.ring(6, size=24), times),
        "test": (capture_files.ring(3, start=0.5, size=24), times[::2]),
    }
    capture_files.write_transforms(folder, sets)
    result = run(f"--clip={folder}", f"--workdir={out}", SMOKE)
    assert result.returncode == 0, result.stderr
    assert "6 frames of 6 instants; the world is moved by" in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["psnr"]["test"] > 10 and report["psnr"]["static"] is None
    arguments = [f"--asset={out / 'asset.npz'}", f"--clip={folder}", "--perceptual=stlpips"]
    command = [sys.executable, "-m", "experiments.evaluate", *arguments]
    result = subprocess.run(
        [*command, f"--workdir={out / 'scores'}"], **OPTIONS, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads((out / "scores" / "evaluation.json").read_text())
    assert list(scores) == ["dynamic", "test"]
    assert scores["test"]["mean"]["psnr"] == pytest.approx(report["psnr"]["test"], abs=1e-3)
    assert all(0 < value < 2 for value in scores["test"]["frames"]["lpips"])
    assert "LPIPS" in result.stdout


@pytest.mark.parametrize(
    ("choice", "words"),
    [("vgg", "stlpips or BACKBONE:FILE, not 'vgg'"), ("vgg:absent.pth", "absent.pth")],
)
def test_perceptual_networks_that_cannot_be_had_are_named(choice, words):
    with pytest.raises((ValueError, OSError), match=words):
        binary.load_perceptual(choice)
    assert binary.load_perceptual(None) is None


def test_the_perceptual_network_and_its_weight_go_together():
    config, network = configs.get_config("smoke"), object()
    with pytest.raises(ValueError, match="no part in the loss"):
        binary.check_perceptual(binary.to_config(config), network)
    config.weights.lpips = 0.1
    binary.check_perceptual(binary.to_config(config), network)
    with pytest.raises(ValueError, match="say which network with --perceptual"):
        binary.check_perceptual(binary.to_config(config), None)


def test_an_interrupted_replacement_goes_on_without_overwrite(finished, clip_folder):
    """Its old outputs are still there; they do not stand in the way of the snapshot.

    What it does not write itself is gone in the end: it would show the old asset.
    """
    workdir, _ = finished
    for name in ("frames/notes.txt", "point_cloud.obj"):
        (workdir / name).write_text("not of ours")
    before = io.load_asset(workdir / "asset.npz")
    arguments = [f"--clip={clip_folder}", f"--workdir={workdir}", SMOKE, "--snapshot_every=1"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--overwrite"], **OPTIONS, stderr=subprocess.PIPE
    )
    while not (workdir / "snapshot.npz").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "The same command, without --overwrite, goes on" in errors
    result = run(*arguments, "--config.static_time=0.5")
    assert result.returncode == 1 and "another clip, configuration or seed" in result.stderr
    assert run(*arguments).returncode == 0
    after = io.load_asset(workdir / "asset.npz")
    np.testing.assert_array_equal(after.splats.means, before.splats.means)
    left = {path.name for path in workdir.iterdir() if path.suffix in (".spz", ".glb", ".obj")}
    assert left == {"point_cloud.obj"}
    assert [path.name for path in (workdir / "frames").iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_keeps_the_state_and_says_how_to_start_anew(
    clip_folder, tmp_path
):
    arguments = [f"--clip={clip_folder}", f"--workdir={tmp_path}", SMOKE]
    result = run(*arguments, "--config.weights.l1=1e39")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "became inf at step 0 of the warmup stage" in result.stderr
    assert f"is kept in {tmp_path / 'snapshot.npz'}; --overwrite starts anew" in result.stderr
    assert (tmp_path / "snapshot.npz").exists()
    assert run(*arguments, "--overwrite").returncode == 0


def test_static_frames_are_scored_at_the_time_of_the_configuration(clip_folder, tmp_path):
    arguments = [f"--clip={clip_folder}", f"--workdir={tmp_path}", SMOKE]
    assert run(*arguments, "--config.static_time=0.5").returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    asset = io.load_asset(tmp_path / "asset.npz")
    views = of_clip(clips.read_clip(clip_folder), 0.5).still
    expected = score(render_views(asset, views), views)["psnr"].mean()
    assert report["psnr"]["static"] == pytest.approx(expected, abs=1e-3)


PRINTS = """
from absl import flags
from experiments import cli, reconstruct
cli.define_config("reconstruct.py")
cli.define_preset(reconstruct.PRESETS)
def main():
    config = reconstruct.to_config(flags.FLAGS.config)
    print(config.capacity, config.fine.steps, config.deformation["name"], config.initializer)
cli.run(main)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset=fast"], "4500 1000 lifespan None"),
        (["--config.fine.steps=7", "--preset", "fast"], "4500 7 lifespan None"),
        ([f"{SMOKE[:-6]}:plain,hexplane", "--preset=quality"], "24000 6000 hexplane None"),
        (
            ["--config.initializer={'name': 'random_cube', 'half_extent': 0.3}"],
            "12000 2000 lifespan {'half_extent': 0.3, 'name': 'random_cube'}",
        ),
        (["--preset=quality", SMOKE], "one preset, not ['smoke', 'quality']"),
        (["--preset=smoke"], "should be one of <fast|default|quality>"),
        (["--config.initializer={'name': 'ply'}"], "missing a required argument: 'path'"),
    ],
)
def test_presets_and_initialisers_on_the_command_line(arguments, words):
    command = [sys.executable, "-c", PRINTS, *arguments]
    result = subprocess.run(command, **OPTIONS, capture_output=True, check=False)
    assert words in result.stdout + result.stderr and "Traceback" not in result.stderr
    assert (result.returncode == 0) == ("None" in words or "half_extent" in words)


def test_the_viewer_runs_along_and_stays_if_told(clip_folder, tmp_path):
    arguments = [f"--clip={clip_folder}", f"--workdir={tmp_path}", SMOKE]
    viewer = ["--viewer_port=18770", "--viewer_hold"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heeded = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # jobs of `&` ignore it
    process = subprocess.Popen(
        [*COMMAND, *arguments, *viewer], **OPTIONS, **pipes, preexec_fn=heeded
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "stays until Ctrl-C" in line:
            break
    assert process.poll() is None, lines
    address = re.search(r"viewer is at (http://127.0.0.1:\d+)\.", "".join(lines))[1]
    with urllib.request.urlopen(address, timeout=10) as page:
        assert page.status == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0 and "Traceback" not in "".join(lines) + errors, errors
    assert (tmp_path / "report.json").exists()
