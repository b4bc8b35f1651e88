"""The generate binary by subprocess: its files, its bytes, and the mistakes people make."""

import json

import numpy as np
import plyfile
import pytest
from binaries import run_binary

from d4d_jax import clips

FILES = {
    "asset.npz",
    "asset_orbit.mp4",
    "comparison.png",
    "curves.jsonl",
    "curves.png",
    "depth.mp4",
    "novel.mp4",
    "orbit.mp4",
    "orbit_frames",
    "point_cloud.ply",
    "report.json",
    "viewer.html",
}


def generate(workdir, *flags):
    """Runs `python -m experiments.generate` with sizes that take seconds."""
    smoke = ["--config=experiments/configs/reconstruct.py:smoke", "--steps=2"]
    return run_binary("generate", f"--workdir={workdir}", *flags, *smoke)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--compilation_cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("generate") / "out"
    result = generate(workdir, "--seed=3", cache)
    assert result.returncode == 0, result.stderr
    return workdir


def test_everything_is_written(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    report = json.loads((finished / "report.json").read_text())
    assert {"psnr", "ssim", "seconds", "splats", "implementation"} <= set(report)
    assert set(report["psnr"]) == {"dynamic", "static", "front"}
    assert report["prompt"]["seed"] == 3
    clip = clips.read_clip(finished / "orbit_frames")
    assert clip.num_frames == 24 and clip.static is not None
    assert clip.motion == pytest.approx(report["measured_motion"])
    vertices = plyfile.PlyData.read(finished / "point_cloud.ply")["vertex"]
    assert 0 < len(vertices) <= report["splats"]
    assert np.isfinite(vertices["x"]).all()


def test_same_seed_same_bytes(finished, tmp_path, cache):
    result = generate(tmp_path / "again", "--seed=3", cache)
    assert result.returncode == 0, result.stderr
    frames = [path.name for path in (finished / "orbit_frames").iterdir()]
    for name in [*(f"orbit_frames/{frame}" for frame in frames), *FILES - {"orbit_frames"}]:
        if name != "report.json":  # It holds the seconds that the run took.
            again = (tmp_path / "again" / name).read_bytes()
            assert again == (finished / name).read_bytes(), name


def test_finished_runs_are_kept(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = generate(finished)
    assert result.returncode == 1
    assert "already holds orbit.mp4" in result.stderr and "--overwrite" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    "flag, code, sentence",
    [
        ("--image=absent.png", 1, "There is no image 'absent.png'"),
        ("--image=README.md", 1, "'README.md' cannot be decoded"),
        ("--checkpoint=absent.npz", 1, "There is no model file absent.npz"),
        ("--motion=-2", 2, "motion"),
        ("--steps=0", 2, "steps"),
        ("--no_such_flag=1", 2, "no_such_flag"),
        ("--config.no_such_key=1", 2, "no_such_key"),
    ],
)
def test_mistakes(tmp_path, flag, code, sentence):
    result = generate(tmp_path / "out", flag)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
