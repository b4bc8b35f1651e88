"""The object of a capture ends up around the origin in a unit cube, whatever its world was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_files import (
    FOCAL,
    SCALE,
    SHIFT,
    SIZE,
    TURN,
    edit_json,
    file_poses,
    project,
    ring,
    surface_points,
    to_here,
    write_multiview,
    write_transforms,
    write_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from d4d_jax import cameras
from d4d_jax.data import synthetic
from gaussians import captures, datasets
from gaussians.datasets import normalisation
from gaussians.rasterize import rasterize
from gaussians.types import Splats

K = np.array([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])


@pytest.fixture(scope="module")
def turntable():
    """Cameras all around, and the silhouettes that they see."""
    camera = ring(8, height=0.9)
    _, alpha = synthetic.render(synthetic.make_scene(), camera, np.zeros(8))
    return camera, alpha


def ball_silhouettes(poses, centre, radius):
    """Masks of a ball, by the definition: rays that pass its centre within the radius."""
    x, y = np.meshgrid(*[np.arange(SIZE) + 0.5] * 2)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T
    rays = np.einsum("vij,hwj->vhwi", poses[:, :3, :3], rays)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    offset = (centre - poses[:, :3, 3])[:, None, None]
    return (np.linalg.norm(np.cross(rays, offset), axis=-1) < radius).astype(np.float32)


def test_a_ball_becomes_the_ball_of_diameter_one_around_the_origin():
    """Off the point that the cameras look at, and of another size."""
    poses = file_poses(ring(8))
    truth = SHIFT + np.array([0.4, -0.5, 0.3])
    alpha = ball_silhouettes(poses, truth, 0.8)
    assert alpha[:, [0, -1]].max() == 0
    centre, scale = normalisation.locate(poses, np.tile(K, (8, 1, 1)), alpha)
    np.testing.assert_allclose(centre, truth, atol=0.04)
    assert scale * 0.8 == pytest.approx(0.5, rel=0.05)


def test_one_bad_mask_and_empty_masks_do_not_count():
    poses = file_poses(ring(40))
    alpha = ball_silhouettes(poses, SHIFT, 0.8)
    expected = normalisation.locate(poses, np.tile(K, (40, 1, 1)), alpha)
    alpha[3] = 1
    alpha[[7, 20]] = 0
    centre, scale = normalisation.locate(poses, np.tile(K, (40, 1, 1)), alpha)
    np.testing.assert_allclose(centre, expected[0], atol=0.01)
    assert scale == pytest.approx(expected[1], rel=0.02)


def test_without_masks_the_cameras_end_up_two_units_away():
    poses = file_poses(ring(5, distance=3.0))
    for alpha in (None, np.zeros((5, SIZE, SIZE), np.float32)):
        centre, scale = normalisation.locate(poses, np.tile(K, (5, 1, 1)), alpha)
        np.testing.assert_allclose(centre, SHIFT, atol=1e-5)
        assert scale == pytest.approx(2 / (3 * SCALE))


def test_the_object_fills_the_unit_cube(tmp_path):
    write_transforms(tmp_path, {"train": (ring(8), np.linspace(0, 1, 8))})
    capture = datasets.read_capture(tmp_path)
    points = np.concatenate([to_here(surface_points(t), capture) for t in np.linspace(0, 1, 8)])
    assert 0.4 < np.abs(points).max() < 0.6


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    log_scale=st.floats(-4, 4),
    shift=st.tuples(*[st.floats(-1000, 1000)] * 3),
    masked=st.booleans(),
)
def test_the_world_of_the_files_does_not_matter(turntable, seed, log_scale, shift, masked):
    """Any similarity of that world gives the same capture, up to its rotation."""
    camera, alpha = turntable
    turn, scale = Rotation.random(random_state=seed).as_matrix(), np.exp(log_scale)
    alpha = alpha if masked else None
    poses = file_poses(camera, np.eye(3), 1.0, np.zeros(3))
    moved = file_poses(camera, turn, scale, np.array(shift))
    first = normalisation.locate(poses, camera.intrinsics, alpha)
    second = normalisation.locate(moved, camera.intrinsics, alpha)
    here, there = ((p[:, :3, 3] - c) * s for p, (c, s) in ((poses, first), (moved, second)))
    np.testing.assert_allclose(there, here @ turn.T, atol=1e-6)


def test_a_camera_at_rest_looks_at_the_origin_of_its_file(tmp_path, caplog):
    camera = cameras.stack([ring(1)[0]] * 3)
    video = write_video(tmp_path, camera, np.array([0, 0.5, 1]))
    at_origin = file_poses(camera, TURN, 2.0, np.zeros(3))

    def place(poses):
        def change(document):
            for frame, pose in zip(document["frames"], poses, strict=True):
                del frame["transform_matrix"]
                frame.update(camera_to_world=pose.tolist(), convention="opencv")

        return change

    edit_json(tmp_path / "clip.json", place(at_origin))
    capture = datasets.read_capture(video)
    np.testing.assert_allclose(capture.centre, 0, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(capture.moving.camera.position, axis=-1), 2, atol=1e-5
    )
    assert "look in parallel" in caplog.text


def test_a_single_camera_at_the_origin_looks_two_units_ahead():
    pose = np.eye(4)[None]
    centre, scale = normalisation.locate(pose, K[None], None)
    np.testing.assert_allclose(centre, [0, 0, 2])
    assert scale == 1


def test_parallel_cameras_with_masks_find_the_object():
    """Rectified cameras: the axes never meet, but the rays through the silhouettes do."""
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3] = np.linspace(-1, 1, 5)
    truth = np.array([0.1, 0.2, 4.0])
    alpha = ball_silhouettes(poses, truth, 0.6)
    centre, _ = normalisation.locate(poses, np.tile(K, (5, 1, 1)), alpha)
    np.testing.assert_allclose(centre, truth, atol=0.2)


def test_cameras_that_cannot_tell():
    rig = np.tile(np.eye(4), (3, 1, 1))
    rig[:, 0, 3] = [0, 1, 2]
    with pytest.raises(ValueError, match="look in parallel"):
        normalisation.locate(rig, np.tile(K, (3, 1, 1)), None)
    outwards = file_poses(ring(6))
    outwards[:, :3, :3] = outwards[:, :3, :3] @ np.diag([-1, 1, -1])
    with pytest.raises(ValueError, match="look away from each other"):
        normalisation.locate(outwards, np.tile(K, (6, 1, 1)), None)


def test_an_opaque_alpha_channel_is_no_mask(tmp_path):
    write_transforms(tmp_path, {"train": (ring(3), np.array([0.0, 0.5, 1.0]))})
    for path in (tmp_path / "train").iterdir():
        Image.open(path).convert("RGB").convert("RGBA").save(path)
    capture = datasets.read_capture(tmp_path)
    assert capture.moving.alpha is None
    np.testing.assert_allclose(
        np.linalg.norm(capture.moving.camera.position, axis=-1), 2, rtol=1e-4
    )


def test_denormalised_splats_look_the_same_from_the_cameras_of_the_files(tmp_path):
    write_multiview(tmp_path, ring(3), np.array([0.0, 0.5]))
    here = datasets.read_capture(tmp_path)
    there = datasets.read_capture(tmp_path, normalise=False)
    key = jax.random.key(0)
    splats = Splats.from_points(
        jax.random.uniform(key, (40, 3), minval=-0.4, maxval=0.4),
        jax.random.uniform(key, (40, 3)),
        scale=0.06,
        opacity=0.8,
    )
    moved = datasets.denormalised(splats, here)
    assert float(jnp.ptp(moved.means)) > 1
    both = [(splats, here.moving.camera[1]), (moved, there.moving.camera[1])]
    pixels = [project(camera, np.asarray(s.means, float)) for s, camera in both]
    np.testing.assert_allclose(*pixels, atol=1e-2)
    pictures = [rasterize(s, camera, jnp.ones(3), capacity=4096).rgb for s, camera in both]
    assert float(jnp.ptp(pictures[0])) > 0.5
    np.testing.assert_allclose(*pictures, atol=2e-3)


def test_denormalised_does_nothing_in_a_clip():
    clip = synthetic.make_clip(0, num_frames=3, size=16)
    splats = Splats.from_points(jnp.ones((4, 3)), jnp.ones((4, 3)), scale=0.1)
    again = datasets.denormalised(splats, captures.of_clip(clip, 0.0))
    for old, new in zip(jax.tree.leaves(splats), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old, new)
