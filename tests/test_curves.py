"""The course of an optimization, and what a run draws of it and of depth."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from d4d_jax.cameras import orbit
from experiments import curves, results
from gaussians.asset import Asset
from gaussians.captures import Views
from gaussians.deformation.identity import Identity
from gaussians.types import Splats


def step(number, loss=0.5, psnr=20.0, stage="coarse"):
    return types.SimpleNamespace(stage=stage, step=number, loss=loss, psnr=psnr, splats=9, eta=1.0)


def write(path, steps, **values):
    curve = curves.CurveFile(path)
    for number in steps:
        curve(step(number, **values))
    return curve


def test_every_step_is_on_disk_at_once_and_a_resumed_run_replaces_its_future(tmp_path):
    path = tmp_path / "curves.jsonl"
    assert curves.read_curve(path) == []
    running = write(path, range(1, 8), loss=0.5)
    assert [row["step"] for row in curves.read_curve(path)] == list(range(1, 8))
    # The process was killed here; the snapshot is of step 5.
    write(path, range(6, 10), loss=0.25).close()
    running.close()
    rows = curves.read_curve(path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == [0.5] * 5 + [0.25] * 4
    assert rows[0] == {"stage": "coarse", "step": 1, "loss": 0.5, "psnr": 20.0, "splats": 9}
    write(path, [1]).close()  # A run that starts anew.
    assert len(curves.read_curve(path)) == 1


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "[1]", '{"step": 3}', "17"])
def test_a_line_that_was_cut_off_ends_the_curve(tmp_path, tail):
    path = tmp_path / "curves.jsonl"
    write(path, [1, 2]).close()
    path.write_text(path.read_text() + tail)
    assert [row["step"] for row in curves.read_curve(path)] == [1, 2]
    write(path, [3]).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_nothing_is_written_before_the_first_step(tmp_path):
    curves.CurveFile(tmp_path / "curves.jsonl").close()
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_smoothing_is_the_mean_of_a_window_around_each_step(values, window):
    values = np.array(values)
    smooth = curves.smoothed(values, window)
    assert smooth.shape == values.shape
    span = min(window, len(values))
    for i in range(len(values)):
        part = values[max(0, i - span // 2) : i + (span - 1) // 2 + 1]
        assert smooth[i] == pytest.approx(part.mean(), abs=1e-9)


def test_recent_means_forget():
    recent = curves.Recent()
    for _ in range(10):
        assert recent(step(1, loss=4.0, psnr=10.0)) == (4.0, 10.0)
    for _ in range(curves.WINDOW):
        last = recent(step(2, loss=1.0, psnr=30.0))
    assert last == (1.0, 30.0)


def test_the_picture_shows_both_curves_and_every_stage(tmp_path):
    rows = [
        {"stage": stage, "step": 100 * i + j, "loss": 1 / (j + 1), "psnr": 20 + j / 9, "splats": 9}
        for i, stage in enumerate(["warmup", "coarse", "fine"])
        for j in range(1, 101)
    ]
    curves.plot_curve(rows, tmp_path / "three.png")
    curves.plot_curve(rows[:100], tmp_path / "one.png")
    three, one = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("three", "one")
    )
    assert three.shape == one.shape == (500, 900, 3)

    def shades(image):  # pale colours that fill much of the picture
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        return [c for c, n in zip(colours, counts, strict=True) if n > 20000 and c.min() < 250]

    assert len(shades(three)) == 3 and len(shades(one)) == 1


def test_depth_is_red_near_blue_far_and_white_where_nothing_is():
    """Two balls along the axis of a camera, the far one to the side."""
    camera = orbit(4, width=48, height=48)
    forward = np.asarray(camera.camera_to_world)[0, :3, 2]
    right = np.asarray(camera.camera_to_world)[0, :3, 0]
    points = np.stack([-0.4 * forward - 0.3 * right, 0.4 * forward + 0.3 * right])
    splats = Splats.from_points(points, np.full((2, 3), 0.5), scale=0.08, opacity=0.99)
    asset = Asset(splats, Identity(), {}, (0.0, 0.0, 0.0))
    blank = np.zeros((1, 48, 48, 3), np.float32)
    views = Views(blank, None, camera[np.array([0])], np.zeros(1, np.float32))
    frames, span = results.depth_frames(asset, views)
    distance = np.linalg.norm(np.asarray(camera.position)[0])
    assert span == pytest.approx((distance - 0.4, distance + 0.4), abs=0.02)
    near, far = frames[0, :, :24], frames[0, :, 24:]
    for side, end in ((near, 1.0), (far, 0.0)):
        darkest = side.reshape(-1, 3)[side.sum(axis=-1).argmin()]
        np.testing.assert_allclose(darkest, colormaps["turbo"](end)[:3], atol=0.1)
    np.testing.assert_allclose(frames[0, 0], 1, atol=1e-5)
    empty = Asset(Splats.from_points(points, points, scale=1.0), Identity(), {})
    hidden = {**vars(empty.splats), "active": jnp.zeros(2, bool)}
    frames, span = results.depth_frames(Asset(Splats(**hidden), Identity(), {}), views)
    assert span is None and (frames == 1).all()


def test_only_our_own_further_files_are_removed(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("0000.ply", "0001.ply", "0007.ply", "mine.ply"):
        (frames / name).write_text("x")
    (tmp_path / "precious.ply").write_text("x")
    listed = ["0000.ply", "0001.ply", "../precious.ply", "mine.ply"]
    index = {"frames": [{"file": name, "t": 0.0} for name in listed]}
    (frames / "frames.json").write_text(json.dumps(index))
    (tmp_path / "point_cloud.spz").write_text("x")
    results._remove_further(tmp_path)
    assert {path.name for path in frames.iterdir()} == {"0007.ply", "mine.ply"}
    assert [path.name for path in tmp_path.glob("*.*")] == ["precious.ply"]
    (frames / "frames.json").write_text("[]")  # of somebody else
    results._remove_further(tmp_path)
    assert (frames / "frames.json").exists()
