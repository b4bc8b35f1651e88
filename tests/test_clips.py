"""Clip folders: round trips, compositing, and one sentence for every kind of broken folder."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from d4d_jax import cameras, clips


@pytest.fixture
def clip():
    rng = np.random.default_rng(0)
    alpha = rng.uniform(size=(4, 8, 6)).astype(np.float32)
    alpha[:, :3] = 0
    alpha[:, 6:] = 1
    color = rng.uniform(size=(4, 8, 6, 3)).astype(np.float32)
    frames = color * alpha[..., None] + 1 - alpha[..., None]
    fields = {}
    for k, view in enumerate(("dynamic", "static", "front")):
        fields[view] = np.roll(frames, k, axis=2)
        fields[f"{view}_alpha"] = np.roll(alpha, k, axis=2)
    return clips.standard_clip(4, 6, 8, caption="a red fox, running", **fields)


@pytest.fixture
def folder(clip, tmp_path):
    clips.write_clip(clip, tmp_path / "clip")
    return tmp_path / "clip"


def test_round_trip(clip, folder):
    again = clips.read_clip(folder)
    for view in ("dynamic", "static", "front"):
        np.testing.assert_allclose(getattr(again, view), getattr(clip, view), atol=1.1 / 255)
        np.testing.assert_allclose(
            getattr(again, f"{view}_alpha"), getattr(clip, f"{view}_alpha"), atol=0.51 / 255
        )
    assert again.caption == clip.caption
    np.testing.assert_allclose(again.camera.world_to_camera, clip.camera.world_to_camera, atol=1e-6)
    np.testing.assert_array_equal(again.timestamps, np.linspace(0, 1, 4, dtype=np.float32))
    expected = 100 * 4 * np.mean((clip.dynamic - clip.static) ** 2)
    assert again.motion == pytest.approx(expected, rel=0.02)


def test_background(folder):
    with Image.open(folder / "multi_frame1.png") as file:
        rgba = np.asarray(file, np.float32) / 255
    red = clips.read_clip(folder, background=(1.0, 0.0, 0.0))
    expected = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * np.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(red.dynamic[1], expected, atol=1e-6)
    assert red.motion == pytest.approx(clips.read_clip(folder).motion)


def test_camera_files_win_over_the_standard_orbit(folder):
    orbit = cameras.orbit(4, elevation=0.4, width=6, height=8)
    for i in range(4):
        (folder / f"multi{i}.json").write_text(json.dumps(cameras.to_json(orbit[i])))
    np.testing.assert_allclose(
        clips.read_clip(folder).camera.world_to_camera, orbit.world_to_camera, atol=1e-6
    )
    for path in folder.glob("*.json"):
        path.unlink()
    standard = cameras.orbit(4, width=6, height=8)
    np.testing.assert_allclose(
        clips.read_clip(folder).camera.world_to_camera, standard.world_to_camera, atol=1e-6
    )


def test_views_may_be_absent(folder):
    for path in (*folder.glob("multi_static*"), *folder.glob("front*")):
        path.unlink()
    clip = clips.read_clip(folder)
    assert clip.static is None and clip.front is None and clip.motion is None
    assert clip.num_frames == 4


def test_resized_averages_areas(clip):
    small = clip.resized(3, 4)
    expected = clip.dynamic.reshape(4, 4, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(small.dynamic, expected, atol=1e-6)
    assert (small.camera.width, small.camera.height) == (3, 4)
    assert clip.resized(12, 16).front_alpha.shape == (4, 16, 12)


def test_clip_is_a_pytree(clip):
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(clip)
    np.testing.assert_allclose(doubled.dynamic, 2 * clip.dynamic)
    assert doubled.caption == clip.caption
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.caption = "other"


def truncate(folder):
    path = folder / "multi_frame2.png"
    path.write_bytes(path.read_bytes()[:60])


def make_gap(folder):
    (folder / "multi_frame1.png").unlink()


def lose_the_first(folder):
    (folder / "front_frame0.png").unlink()


def change_one_size(folder):
    Image.new("RGBA", (5, 5)).save(folder / "multi_static_frame3.png")


def shorten_one_view(folder):
    (folder / "multi_static_frame3.png").unlink()


def lose_a_camera(folder):
    (folder / "multi2.json").unlink()


def break_a_camera(folder):
    (folder / "multi2.json").write_text("{")


def number_for_a_camera(folder):
    (folder / "multi2.json").write_text("3")


def not_an_image(folder):
    (folder / "front_frame1.png").write_text("no picture")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage, error, sentence",
    [
        (truncate, ValueError, "multi_frame2.png' cannot be decoded"),
        (make_gap, FileNotFoundError, "multi_frame1.png' is missing, although multi_frame3.png"),
        (lose_the_first, FileNotFoundError, "front_frame0.png' is missing"),
        (change_one_size, ValueError, "multi_static_frame3.png' is 5 x 5 RGBA, but .* is 6 x 8"),
        (shorten_one_view, ValueError, "4 dynamic frames of 6 x 8, 3 static frames"),
        (lose_a_camera, FileNotFoundError, "multi2.json' is missing"),
        (break_a_camera, ValueError, "multi2.json' is no camera file"),
        (number_for_a_camera, ValueError, "multi2.json' is no camera file: it holds 3"),
        (not_an_image, ValueError, "front_frame1.png' cannot be decoded"),
        (empty, FileNotFoundError, "holds no clip"),
        (shutil.rmtree, FileNotFoundError, "There is no clip folder"),
    ],
)
def test_broken_folders(folder, damage, error, sentence):
    damage(folder)
    with pytest.raises(error, match=sentence) as caught:
        clips.read_clip(folder)
    assert "\n" not in str(caught.value)


def test_nothing_is_overwritten(clip, folder):
    before = (folder / "multi_frame0.png").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a clip"):
        clips.write_clip(clip, folder)
    assert (folder / "multi_frame0.png").read_bytes() == before


def test_read_image(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no image .*absent\.png"):
        clips.read_image(tmp_path / "absent.png")
    Image.new("L", (3, 2), 255).save(Path(tmp_path) / "grey.png")
    assert clips.read_image(tmp_path / "grey.png").shape == (2, 3, 3)
    Image.fromarray(np.full((2, 3), 30000, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(clips.read_image(tmp_path / "deep.png"), 30000 / 65535, rtol=1e-5)
