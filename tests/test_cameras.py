"""Cameras, checked against Blender's own renders and against closed forms."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from d4d_jax import cameras, clips

CLIPS = Path(clips.__file__).parent / "assets" / "clips"


def project(camera, points):
    """Pixels (n, 2) of world points (n, 3), by the definition of a pinhole camera."""
    inside = points @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    pixels = inside @ camera.intrinsics.T
    return pixels[:, :2] / pixels[:, 2:]


def occupied(camera, silhouette, points):
    """Whether each point projects into the silhouette (h, w) of the camera."""
    column, row = np.floor(project(camera, points)).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
    hit = np.zeros(len(points), bool)
    hit[inside] = silhouette[row[inside], column[inside]]
    return hit


def splat(camera, points):
    """The pixels (h, w) that some point projects into."""
    picture = np.zeros((camera.height, camera.width), bool)
    column, row = np.floor(project(camera, points)).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
    picture[row[inside], column[inside]] = True
    return picture


def carve(orbit, alphas, resolution=72):
    """The points of a grid that the silhouettes of every second view allow."""
    grid = (np.arange(resolution) + 0.5) / resolution * 1.2 - 0.6
    points = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(-1, 3)
    silhouettes = np.asarray(alphas) > 0.5
    for i in range(0, 23, 2):
        points = points[occupied(orbit[i], silhouettes[i], points)]
    return points


def held_out_agreement(orbit, alphas):
    """Carves a visual hull from every second view; its mean IoU with the others."""
    points, silhouettes = carve(orbit, alphas), np.asarray(alphas) > 0.5
    scores = []
    for i in range(1, 23, 2):
        picture = splat(orbit[i], points)
        scores.append((picture & silhouettes[i]).sum() / (picture | silhouettes[i]).sum())
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def rendered():
    """A clip that Blender rendered: independent of our camera code."""
    return clips.read_clip(sorted(CLIPS.glob("*/multi_static_frame0.png"))[0].parent)


def test_hull_of_half_the_views_matches_the_other_half(rendered):
    good = held_out_agreement(rendered.camera, rendered.static_alpha)
    assert good > 0.8
    orbit = rendered.camera
    shift = np.array([[0, 0, 4], [0, 0, 0], [0, 0, 0]], np.float32)
    flip = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)
    wrong = {
        "azimuth direction": orbit[::-1],
        "principal point": dataclasses.replace(orbit, intrinsics=orbit.intrinsics + shift),
        "camera axes": dataclasses.replace(orbit, world_to_camera=flip @ orbit.world_to_camera),
    }
    for mistake, camera in wrong.items():
        assert held_out_agreement(camera, rendered.static_alpha) < good - 0.05, mistake


def test_hull_fills_the_unit_cube(rendered):
    """Objects are normalised to a unit cube, so focal length and distance fix the hull's size."""
    extent = np.ptp(carve(rendered.camera, rendered.static_alpha), axis=0).max()
    assert 0.9 < extent < 1.1


def test_orbit_facts():
    orbit = cameras.orbit(24)
    np.testing.assert_allclose(orbit.position[0], [0, -2, 0], atol=1e-6)
    np.testing.assert_allclose(orbit.position[23], orbit.position[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(orbit.position, axis=-1), 2, rtol=1e-6)
    assert orbit.position[1][0] > 0  # counter-clockwise from above: from -y towards +x
    assert math.isclose(float(orbit.intrinsics[0, 0, 0]), 355.5556, rel_tol=1e-6)
    # The first camera looks along +y: a point to the right and above lands right and above.
    x, y = project(orbit[0], np.array([[0.1, 0.0, 0.2]]))[0]
    assert x > 128 > y
    raised = cameras.orbit(4, elevation=math.radians(30))
    np.testing.assert_allclose(raised.position[:, 2], 1.0, rtol=1e-6)
    np.testing.assert_allclose(project(raised[2], np.zeros((1, 3))), [[128, 128]], atol=1e-3)


def test_opengl_axes_are_blenders():
    # Blender's camera at (0, -2, 0) looking along +y: x right, y up (+z), z backward (-y).
    matrix = cameras.orbit(24).opengl_camera_to_world[0]
    np.testing.assert_allclose(
        matrix, [[1, 0, 0, 0], [0, 0, -1, -2], [0, 1, 0, 0], [0, 0, 0, 1]], atol=1e-6
    )
    back = cameras.opengl_to_opencv(cameras.opencv_to_opengl(matrix))
    np.testing.assert_array_equal(back, matrix)


@pytest.mark.parametrize("drop", [("matrix_world",), ("x", "y", "z", "origin")])
def test_json_round_trip_by_either_pose(drop):
    camera = cameras.orbit(5, elevation=0.3, width=64, height=48)[3]
    record = {k: v for k, v in cameras.to_json(camera).items() if k not in drop}
    again = cameras.from_json(record, 64, 48)
    np.testing.assert_allclose(again.world_to_camera, camera.world_to_camera, atol=1e-6)
    np.testing.assert_allclose(again.intrinsics, camera.intrinsics, rtol=1e-5)


def test_resized_camera_sees_the_same():
    camera = cameras.orbit(3, width=256, height=192)[1]
    point = np.array([[0.1, -0.2, 0.3]])
    np.testing.assert_allclose(
        project(camera.resized(64, 48), point) * 4, project(camera, point), rtol=1e-5
    )


def test_camera_is_a_pytree():
    orbit = cameras.orbit(4)
    positions = jax.jit(jax.vmap(lambda camera: camera.position))(orbit)
    np.testing.assert_allclose(positions, orbit.position, atol=1e-6)
    assert jax.tree.map(lambda _: None, orbit).width == 256
    stacked = cameras.stack([orbit[i] for i in range(4)])
    np.testing.assert_array_equal(stacked.world_to_camera, orbit.world_to_camera)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: cameras.orbit(1), "at least 2 views; got 1"),
        (lambda: cameras.orbit(4, elevation=2.0), "between -pi/2 and pi/2 radians; got 2.0"),
        (lambda: cameras.intrinsics_from_fov(4.0, 8, 8), "between 0 and pi radians; got 4.0"),
        (lambda: cameras.look_at(np.array([0.0, 0.0, 1.0])), "cannot look along the up axis"),
        (lambda: cameras.from_json({"x": [1, 0, 0]}, 8, 8), "x_fov, y_fov and either"),
        (lambda: cameras.stack([]), r"one common image size; got \[\]"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("x", [2.0, 0.0, 0.0], "not a rotation"),
        ("x", [1.0, 0.0], "x must be 3 finite numbers"),
        ("origin", "nowhere", "origin must be 3 finite numbers; got 'nowhere'"),
        ("z", [float("nan"), 0.0, 0.0], "z must be 3 finite numbers"),
        ("x_fov", 0, "x_fov must lie between 0 and pi radians; got 0"),
        ("x_fov", float("nan"), "x_fov must lie between"),
        ("y_fov", "0.6", "y_fov must lie between 0 and pi radians; got '0.6'"),
    ],
)
def test_broken_camera_records(field, value, sentence):
    record = cameras.to_json(cameras.orbit(3)[0]) | {field: value}
    with pytest.raises(ValueError, match=sentence):
        cameras.from_json(record, 8, 8)
