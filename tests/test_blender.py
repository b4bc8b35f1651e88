"""The Blender script, as far as it goes without Blender: arguments, cameras, times, mistakes."""

import json
import math
import pathlib
import subprocess
import sys

import gltf_files
import numpy as np
import pytest

from d4d_jax import cameras
from d4d_jax.data import blender
from d4d_jax.data import blender_plan as plan


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, blender.__file__, *map(str, arguments)], capture_output=True, text=True
    )


def assert_one_sentence(result, status, words):
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def asset(tmp_path):
    return gltf_files.write_glb(tmp_path / "thing.glb")


@pytest.mark.parametrize(("elevation", "azimuth"), [(0.0, 0.0), (0.3, 0.0), (-0.2, 1.1)])
def test_poses_are_those_of_the_library_orbit(elevation, azimuth):
    orbit = cameras.orbit(7, elevation=elevation, azimuth=azimuth)
    poses = [plan.camera_to_world(i, 7, elevation, azimuth) for i in range(7)]
    np.testing.assert_allclose(poses, orbit.opengl_camera_to_world, atol=1e-6)


def test_the_field_of_view_is_the_library_one():
    assert plan.FOV == pytest.approx(cameras.FOV, abs=1e-9)
    assert pytest.approx(math.radians(39.5978), abs=1e-5) == plan.FOV


def test_camera_records_read_back_as_the_orbit():
    expected = cameras.orbit(5, elevation=0.2, width=32, height=32)
    for i in range(5):
        record = plan.camera_json(plan.camera_to_world(i, 5, 0.2), [[-0.5] * 3, [0.5] * 3])
        camera = cameras.from_json(json.loads(json.dumps(record)), 32, 32)
        np.testing.assert_allclose(camera.world_to_camera, expected[i].world_to_camera, atol=1e-5)
        np.testing.assert_allclose(camera.intrinsics, expected[i].intrinsics, rtol=1e-5)


def test_frame_times_spread_evenly_from_the_first_to_the_last():
    times = [whole + part for whole, part in plan.resample_frames(1.0, 14.0, 24)]
    np.testing.assert_allclose(times, np.linspace(1, 14, 24), atol=1e-5)
    for whole, part in plan.resample_frames(0.0, 20.8, 24):
        assert whole == int(whole) and 0 <= part < 1


def test_one_frame_is_the_first():
    assert plan.resample_frames(3.0, 9.0, 1) == [(3, 0.0)]


POSE = np.eye(4).tolist()


def write_transforms(path, **changes):
    frame = {"file_path": "./test/r_0", "time": 0.5, "transform_matrix": POSE} | changes
    path.write_text(json.dumps({"camera_angle_x": 0.7, "frames": [frame]}))
    return path


def test_further_views_are_read_as_written(tmp_path):
    angle, frames = plan.read_transforms(write_transforms(tmp_path / "transforms_test.json"))
    assert angle == 0.7 and frames == [("./test/r_0", 0.5, POSE)]


@pytest.mark.parametrize(
    "changes",
    [{"time": 1.5}, {"file_path": "../r_0"}, {"file_path": "/r_0"}, {"transform_matrix": [[1.0]]}],
)
def test_further_views_out_of_range_are_named(tmp_path, asset, changes):
    path = write_transforms(tmp_path / "views.json", **changes)
    result = run_script("--asset", asset, "--out", tmp_path / "out", "--transforms", path)
    assert_one_sentence(result, 1, f"of {path} needs a path within the folder, a time in [0, 1]")
    assert not (tmp_path / "out").exists()


def test_a_list_of_views_that_is_none_is_named(tmp_path, asset):
    path = tmp_path / "views.json"
    path.write_text("[]")
    result = run_script("--asset", asset, "--out", tmp_path / "out", "--transforms", path)
    assert_one_sentence(result, 1, f"{path} is no list of views")
    missing = tmp_path / "missing.json"
    result = run_script("--asset", asset, "--out", tmp_path / "out", "--transforms", missing)
    assert_one_sentence(result, 1, f"--transforms={missing} cannot be read")


def test_the_held_out_cameras_of_the_benchmark_can_be_rendered():
    path = pathlib.Path(__file__).parents[1] / "benchmarks/held_out/transforms_test.json"
    angle, frames = plan.read_transforms(path)
    assert angle == pytest.approx(plan.FOV) and len({name for name, _, _ in frames}) == 64
    for _, time, pose in frames:
        assert np.linalg.norm(np.array(pose)[:3, 3]) == pytest.approx(plan.DISTANCE, abs=1e-6)
        assert (8 * time - 0.5) % 1 == 0


def test_actions_go_by_full_name_or_unique_last_part():
    names = ["Rig|Rig|Walk", "Rig|Rig|Run", "Other|Run"]
    assert plan.pick_action(names, "Rig|Rig|Run") == "Rig|Rig|Run"
    assert plan.pick_action(names, "Walk") == "Rig|Rig|Walk"
    assert plan.pick_action(["Only"], None) == "Only"


@pytest.mark.parametrize("wanted", ["Swim", "Run", None])
def test_an_unknown_or_ambiguous_action_lists_the_names(wanted):
    with pytest.raises(plan.RenderError, match=r"Other.Run, Rig.Run, Rig.Walk"):
        plan.pick_action(["Rig|Walk", "Rig|Run", "Other|Run"], wanted)


def test_defaults_are_the_published_settings():
    args = blender.parse_args(["--asset", "a.glb", "--out", "out"])
    assert (args.resolution, args.samples, args.frames) == (256, 128, 24)
    assert args.filter_width == 0.01 and args.views == ("dynamic", "static", "front")
    assert (args.elevation, args.azimuth) == ((0.0, 0.0), 0.0)


def test_views_are_a_subset():
    args = blender.parse_args(["--asset", "a.glb", "--out", "o", "--views", "front, dynamic"])
    assert args.views == ("dynamic", "front")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--views", "top", "'top' is not a subset of dynamic,static,front"),
        ("--frames", "0", "'0' is not a positive whole number"),
        ("--resolution", "big", "'big' is not a positive whole number"),
        ("--elevation", "90", "'90' is neither degrees within [-89, 89] nor LOW,HIGH"),
    ],
)
def test_a_wrong_value_is_named(option, value, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        blender.parse_args(["--asset", "a.glb", "--out", "out", option, value])
    assert words in capsys.readouterr().err


def test_the_output_folder_must_be_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        blender.parse_args(["--asset", "a.glb"])
    assert "--out names the folder to write" in capsys.readouterr().err


def test_without_bpy_the_script_says_what_to_install(asset, tmp_path):
    code = (
        "import sys; sys.modules['bpy'] = None; import runpy; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [blender.__file__, "--asset", asset, "--out", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert_one_sentence(result, 1, "pip install bpy")
    assert not (tmp_path / "out").exists()


def test_a_missing_asset_is_named(tmp_path):
    result = run_script("--asset", tmp_path / "none.glb", "--out", tmp_path / "out")
    assert_one_sentence(result, 1, f"There is no asset file {tmp_path / 'none.glb'}.")


def test_other_paths_that_cannot_be(asset, tmp_path):
    def check(words, **changes):
        options = {"asset": asset, "out": tmp_path / "out", **changes}
        args = blender.parse_args([f"--{name}={value}" for name, value in options.items()])
        with pytest.raises(plan.RenderError, match=words):
            blender.check_paths(args)

    (tmp_path / "model.obj").write_text("o thing")
    check("model.obj is not a .glb", asset=tmp_path / "model.obj")
    (tmp_path / "text.glb").write_text("nothing binary")
    check("text.glb is named .glb but", asset=tmp_path / "text.glb")
    check("is a file, not a folder", out=asset)
    check("already holds files; give --overwrite", out=tmp_path)


def test_overwriting_removes_the_frames_of_the_longer_clip(tmp_path):
    names = ["multi_frame0.png", "multi_frame23.png", "multi23.json", "multi_static_frame23.png"]
    others = ["notes.txt", "multi_frame.png", "front.json", "my_multi_frame3.png"]
    for name in names + others:
        (tmp_path / name).touch()
    blender.delete_views(tmp_path, ("dynamic", "static"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
