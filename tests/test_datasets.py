"""Captures of other layouts show a known scene where their cameras project it."""

import numpy as np
import pytest
from capture_files import (
    FLIP,
    SCALE,
    SIZE,
    assert_seen,
    edit_json,
    file_poses,
    read_png,
    rgba,
    ring,
    write_images,
    write_json,
    write_multiview,
    write_transforms,
    write_video,
)

from d4d_jax import cameras
from d4d_jax.clips import read_clip, write_clip
from d4d_jax.data import synthetic
from gaussians import captures, datasets
from gaussians.datasets import ReadOptions

TIMES = np.array([0.0, 0.25, 0.5, 0.75])


@pytest.fixture(scope="module")
def dnerf(tmp_path_factory):
    # The training times are shuffled, and the test set begins earlier.
    sets = {
        "train": (ring(6, wider=12), np.array([0.5, 0.1, 0.2, 0.6, 0.3, 0.9])),
        "val": (ring(2, start=0.4), np.array([0.2, 0.3])),
        "test": (ring(3, height=-0.4), np.array([0.0, 0.5, 0.9])),
    }
    return write_transforms(tmp_path_factory.mktemp("dnerf"), sets)


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return write_multiview(tmp_path_factory.mktemp("rig"), ring(4), TIMES, held_out=["cam02"])


def test_transforms(dnerf):
    capture = datasets.read_capture(dnerf)
    assert list(capture.sets) == ["dynamic", "val", "test"]
    assert capture.still is None and capture.seconds is None
    moments = np.array([0.1, 0.2, 0.3, 0.5, 0.6, 0.9])
    np.testing.assert_allclose(capture.moving.timestamps, moments / 0.9, rtol=1e-6)
    assert_seen(capture.moving, capture, moments)
    assert_seen(capture.held_out["val"], capture, [0.2, 0.3])
    assert_seen(capture.held_out["test"], capture, [0.0, 0.5, 0.9])
    for views in capture.sets.values():
        for leaf in (views.rgb, views.alpha, views.camera.world_to_camera, views.timestamps):
            assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32


def test_frames_are_composited_and_keep_their_alpha(dnerf):
    capture = datasets.read_capture(dnerf, background=(0.0, 0.5, 1.0))
    image = read_png(dnerf / "train" / "r_001.png")  # the earliest
    cover = image[..., 3:]
    expected = image[..., :3] * cover + (1 - cover) * np.array([0, 0.5, 1])
    np.testing.assert_allclose(capture.moving.rgb[0], expected, atol=1e-6)
    np.testing.assert_array_equal(capture.moving.alpha[0], image[..., 3])
    assert capture.background == (0.0, 0.5, 1.0)


def test_size_resizes_frames_and_cameras(dnerf):
    capture = datasets.read_capture(dnerf, size=(32, 40))
    assert capture.moving.rgb.shape == (6, 40, 32, 3)
    assert (capture.moving.camera.width, capture.moving.camera.height) == (32, 40)
    assert_seen(capture.moving, capture, np.array([0.1, 0.2, 0.3, 0.5, 0.6, 0.9]))


def test_stride_and_limit_choose_instants(dnerf, rig):
    capture = datasets.read_capture(dnerf, stride=2, limit=2)
    assert_seen(capture.moving, capture, [0.1, 0.3])
    assert_seen(capture.held_out["val"], capture, [0.2])
    assert_seen(capture.held_out["test"], capture, [0.0])
    capture = datasets.read_capture(dnerf, limit=3)
    assert_seen(capture.held_out["val"], capture, [0.2, 0.3])
    capture = datasets.read_capture(rig, stride=2)
    assert_seen(capture.moving, capture, np.repeat(TIMES[::2], 3))
    assert capture.seconds == pytest.approx(0.2)
    assert len(datasets.read_capture(rig, limit=3).held_out["cam02"]) == 3


def test_without_times_nothing_moves(tmp_path):
    write_transforms(tmp_path, {"train": (ring(4), None), "test": (ring(2), None)})
    capture = datasets.read_capture(tmp_path)
    assert capture.still is capture.moving
    assert capture.instants.tolist() == [0.0]
    assert_seen(capture.still, capture, np.zeros(4))
    assert capture.held_out["test"].timestamps.tolist() == [0.0, 0.0]


def test_nerfstudio_intrinsics_for_each_frame(tmp_path):
    camera = ring(3)
    write_transforms(tmp_path, {"train": (camera, TIMES[:3])})

    def change(document):
        del document["camera_angle_x"]
        document.update(h=SIZE, camera_model="OPENCV", k1=0.0, p1=0)
        for i, frame in enumerate(document["frames"]):
            frame["file_path"] += ".png"
            frame.update(fl_x=60 + i, fl_y=61.0, cx=20, cy=25.5 + i, w=SIZE)

    edit_json(tmp_path / "transforms_train.json", change)
    (tmp_path / "transforms_train.json").rename(tmp_path / "transforms.json")
    capture = datasets.read_capture(tmp_path)
    expected = [[[60 + i, 0, 20], [0, 61, 25.5 + i], [0, 0, 1]] for i in range(3)]
    np.testing.assert_allclose(capture.moving.camera.intrinsics, expected)


def test_multiview_images(rig):
    capture = datasets.read_capture(rig)
    assert list(capture.sets) == ["dynamic", "cam02"]
    assert capture.seconds == pytest.approx(0.3)
    np.testing.assert_allclose(capture.instants, np.arange(4) / 3, rtol=1e-6)
    assert_seen(capture.moving, capture, np.repeat(TIMES, 3))
    assert_seen(capture.held_out["cam02"], capture, TIMES)
    pose = capture.moving.camera.world_to_camera
    np.testing.assert_allclose(pose[:3], pose[3:6])  # the rig at every instant


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_multiview_videos(tmp_path, kind):
    write_multiview(tmp_path, ring(3), TIMES, kind=kind, fps=5)
    capture = datasets.read_capture(tmp_path)
    assert capture.moving.alpha is None
    assert capture.seconds == pytest.approx(0.6)  # by the videos' own rate
    assert_seen(capture.moving, capture, np.repeat(TIMES, 3))


def test_uneven_times(tmp_path):
    write_multiview(tmp_path, ring(3), TIMES, times=[2.0, 2.5, 4.0, 6.0])
    capture = datasets.read_capture(tmp_path)
    np.testing.assert_allclose(capture.instants, [0, 0.125, 0.5, 1])
    assert capture.seconds == 4


def test_masks_become_the_alpha_of_videos(tmp_path):
    camera = ring(3)
    write_multiview(tmp_path, camera, TIMES, kind="mp4")
    for i in range(3):
        alpha = rgba(cameras.stack([camera[i]] * 4), TIMES)[..., 3]
        write_images(tmp_path / "masks" / f"cam{i:02d}", alpha)
    capture = datasets.read_capture(tmp_path, background=(0.0, 0.0, 0.0))
    assert capture.moving.alpha is not None
    assert capture.moving.rgb[capture.moving.alpha == 0].max() == 0
    assert_seen(capture.moving, capture, np.repeat(TIMES, 3))
    points = capture.moving.camera.position / capture.scale  # scaled by the masks
    assert np.abs(np.linalg.norm(points, axis=-1) - 2 * SCALE).max() < 1
    video = write_video(tmp_path, camera, TIMES[:3])
    write_images(tmp_path / "masks" / "clip", rgba(camera, TIMES[:3])[..., 3])
    single = datasets.read_capture(video)
    assert_seen(single.moving, single, TIMES[:3])
    assert single.moving.alpha is not None


def test_masks_of_transforms(tmp_path, dnerf):
    camera, moments = ring(6, wider=12), np.array([0.5, 0.1, 0.2, 0.6, 0.3, 0.9])
    write_transforms(tmp_path, {"train": (camera, moments)})
    images = rgba(camera, moments)
    write_images(tmp_path / "masks", images[..., 3])
    write_images(tmp_path / "train", images[..., :3])

    def change(document):
        for i, frame in enumerate(document["frames"]):
            frame.update(file_path=f"train/{i:04d}.png", mask_path=f"masks/{i:04d}.png")

    edit_json(tmp_path / "transforms_train.json", change)
    found, expected = datasets.read_capture(tmp_path), datasets.read_capture(dnerf)
    np.testing.assert_allclose(found.moving.rgb, expected.moving.rgb, atol=1e-2)
    np.testing.assert_allclose(found.moving.alpha, expected.moving.alpha)


@pytest.mark.parametrize(
    "spelling", ["opengl", "world_to_camera", "opengl_world", "transform_matrix", "3x4"]
)
def test_spellings_of_a_pose(tmp_path, rig, spelling):
    write_multiview(tmp_path, ring(4), TIMES, held_out=["cam02"])

    def change(document):
        for record in document["cameras"]:
            pose = np.array(record.pop("camera_to_world"))
            if spelling == "opengl":
                record.update(convention="opengl", camera_to_world=(pose @ FLIP).tolist())
            elif spelling == "world_to_camera":
                record.update(world_to_camera=np.linalg.inv(pose).tolist())
            elif spelling == "opengl_world":
                matrix = np.linalg.inv(pose @ FLIP)
                record.update(convention="opengl", world_to_camera=matrix.tolist())
            elif spelling == "transform_matrix":
                record.update(transform_matrix=(pose @ FLIP).tolist())
            else:
                record.update(camera_to_world=pose[:3].tolist())

    edit_json(tmp_path / "cameras.json", change)
    found, expected = (datasets.read_capture(folder).moving.camera for folder in (tmp_path, rig))
    np.testing.assert_allclose(found.world_to_camera, expected.world_to_camera, atol=1e-5)


def test_published_camera_records(tmp_path):
    camera = ring(3)
    write_multiview(tmp_path, camera, TIMES)
    poses = file_poses(camera)

    def change(document):
        del document["convention"]
        for i, record in enumerate(document["cameras"]):
            one = cameras.Camera(cameras.invert(poses[i]), camera.intrinsics[i], SIZE, SIZE)
            document["cameras"][i] = {"name": record["name"], **cameras.to_json(one)}

    edit_json(tmp_path / "cameras.json", change)
    capture = datasets.read_capture(tmp_path)
    assert_seen(capture.moving, capture, np.repeat(TIMES, 3))


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_video_of_a_moving_camera(tmp_path, kind):
    times = np.linspace(0, 1, 10)
    video = write_video(tmp_path, ring(10), times, fps=10, kind=kind)
    capture = datasets.read_capture(video)
    assert capture.seconds == pytest.approx(0.9)
    np.testing.assert_allclose(capture.moving.timestamps, times, atol=1e-6)
    assert_seen(capture.moving, capture, times)
    thinned = datasets.read_capture(video, stride=3)
    assert_seen(thinned.moving, thinned, times[::3])


def test_video_of_a_resting_camera(tmp_path):
    camera = cameras.stack([ring(1)[0]] * 5)
    video = write_video(tmp_path, camera, np.linspace(0, 1, 5))
    pose = file_poses(camera)[0].tolist()
    single = {"convention": "opencv", "camera_to_world": pose, "fx": 60, "fps": 2}
    write_json(tmp_path / "elsewhere" / "camera.json", single)
    one = datasets.read_video(video, tmp_path / "elsewhere" / "camera.json")
    assert_seen(one.moving, one, np.linspace(0, 1, 5))
    assert one.seconds == 2
    every = datasets.read_video(video)
    np.testing.assert_allclose(
        one.moving.camera.world_to_camera, every.moving.camera.world_to_camera, atol=1e-5
    )


def test_video_of_a_zooming_camera(tmp_path):
    video = write_video(tmp_path, ring(4), TIMES)

    def change(document):
        for i, frame in enumerate(document["frames"]):
            frame["fl_x"] = 60 + i

    edit_json(tmp_path / "clip.json", change)
    capture = datasets.read_capture(video, stride=2)
    assert capture.moving.camera.intrinsics[:, 0, 0].tolist() == [60, 62]


def test_video_folders(tmp_path):
    times = np.linspace(0, 1, 4)
    write_video(tmp_path, ring(4), times)
    (tmp_path / "clip.json").rename(tmp_path / "cameras.json")
    capture = datasets.read_capture(tmp_path)
    assert_seen(capture.moving, capture, times)
    write_images(tmp_path / "frames", rgba(ring(4), times))
    images = datasets.read_video(tmp_path / "frames", tmp_path / "cameras.json")
    assert images.seconds is None and images.moving.alpha is not None
    assert_seen(images.moving, images, times)


def test_clips(tmp_path):
    clip = synthetic.make_clip(1, num_frames=5, size=24)
    write_clip(clip, tmp_path)
    capture = datasets.read_capture(tmp_path, background=(0.0, 0.0, 0.0), size=(16, 16))
    again = read_clip(tmp_path, background=(0.0, 0.0, 0.0), size=(16, 16))
    expected = captures.of_clip(again, 0.0)
    assert list(capture.sets) == ["dynamic", "static", "front"]
    for name, views in expected.sets.items():
        np.testing.assert_array_equal(capture.sets[name].rgb, views.rgb)
        np.testing.assert_array_equal(capture.sets[name].timestamps, views.timestamps)
    fewer = datasets.read_capture(tmp_path, stride=2)
    assert fewer.instants.tolist() == [0, 0.5, 1] and len(fewer.held_out["front"]) == 3


def test_layouts_are_recognised(dnerf, rig, tmp_path):
    assert datasets.find_layout(dnerf) == "transforms"
    assert datasets.find_layout(rig) == "multiview"
    video = write_video(tmp_path, ring(2), np.array([0.0, 1.0]))
    assert datasets.find_layout(video) == "video"
    chosen = datasets.read_capture(rig, layout="multiview")
    direct = datasets.read_multiview(rig, ReadOptions())
    np.testing.assert_array_equal(chosen.moving.rgb, direct.moving.rgb)


def test_normalise_false_keeps_the_world_of_the_files(rig):
    capture = datasets.read_capture(rig, normalise=False)
    assert capture.centre == (0, 0, 0) and capture.scale == 1
    poses = file_poses(ring(4))[[0, 1, 3]]
    found = np.linalg.inv(np.asarray(capture.moving.camera.world_to_camera[:3], float))
    np.testing.assert_allclose(found, poses, atol=1e-4)
    assert_seen(capture.moving, capture, np.repeat(TIMES, 3))
    assert np.linalg.norm(poses[0, :3, 3]) > 2 * SCALE  # a world of its own


def test_a_clip_may_hold_out_views_of_further_cameras(tmp_path):
    write_clip(synthetic.make_clip(1, num_frames=3, size=24), tmp_path)
    camera, times = ring(3, height=-0.4), np.array([0.1, 0.5, 0.85])
    as_it_is = {"turn": np.eye(3), "scale": 1.0, "shift": np.zeros(3)}
    write_transforms(tmp_path, {"test": (camera, times)}, **as_it_is)
    capture = datasets.read_capture(tmp_path)
    assert list(capture.sets) == ["dynamic", "static", "front", "test"]
    views = capture.held_out["test"]
    np.testing.assert_allclose(views.timestamps, times, rtol=1e-6)
    np.testing.assert_allclose(
        views.camera.world_to_camera, camera.world_to_camera, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(views.camera.intrinsics, camera.intrinsics, rtol=1e-5)
    np.testing.assert_allclose(views.alpha, rgba(camera, times)[..., 3], atol=0.003)

    edit_json(tmp_path / "transforms_test.json", lambda d: d["frames"][1].update(time=1.5))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], the clip's; got 1.5"):
        datasets.read_capture(tmp_path)
