"""Procedural clips: what the pixels show follows from the scene, the cameras and the time."""

import numpy as np
import pytest

from d4d_jax import cameras
from d4d_jax.data import synthetic


@pytest.fixture(scope="module")
def clip():
    return synthetic.make_clip(0, num_frames=9, size=48)


def project(camera, point):
    """Pixel coordinates of a world point, by the definition of the camera."""
    in_camera = camera.world_to_camera @ np.append(point, 1)
    x, y, z = camera.intrinsics @ in_camera[:3]
    return x / z, y / z


def test_has_the_asked_shape_and_range(clip):
    for view in ("dynamic", "static", "front"):
        frames, alpha = getattr(clip, view), getattr(clip, f"{view}_alpha")
        assert frames.shape == (9, 48, 48, 3) and frames.dtype == np.float32
        assert alpha.shape == (9, 48, 48)
        assert 0 <= frames.min() and frames.max() <= 1
        assert set(np.unique(alpha)) <= {0, 0.25, 0.5, 0.75, 1}
    assert clip.timestamps[0] == 0 and clip.timestamps[-1] == 1


def test_the_background_shows_where_alpha_is_zero():
    clip = synthetic.make_clip(0, num_frames=2, size=24, background=(0.0, 0.5, 1.0))
    behind = clip.dynamic[clip.dynamic_alpha == 0]
    assert len(behind) > 500
    np.testing.assert_allclose(behind, np.broadcast_to([0, 0.5, 1], behind.shape))


def test_no_object_touches_the_border():
    for seed in range(4):
        clip = synthetic.make_clip(seed, num_frames=9, size=32, samples=1)
        for alpha in (clip.dynamic_alpha, clip.static_alpha, clip.front_alpha):
            assert alpha[:, [0, -1]].max() == 0 and alpha[:, :, [0, -1]].max() == 0


def test_first_and_last_frames_close_the_orbit_and_the_motion(clip):
    np.testing.assert_allclose(clip.dynamic[0], clip.static[0])
    np.testing.assert_allclose(clip.dynamic[0], clip.front[0])
    np.testing.assert_allclose(clip.dynamic[-1], clip.dynamic[0], atol=0.26)  # rays at an edge
    assert np.abs(clip.dynamic[-1] - clip.dynamic[0]).mean() < 1e-3
    assert np.abs(clip.dynamic[4] - clip.static[4]).mean() > 0.01
    assert np.abs(clip.front[4] - clip.front[0]).mean() > 0.01


def test_a_pure_red_ball_stands_where_the_camera_projects_it():
    """Fails when an axis, the direction of the orbit, the time or the principal point is wrong."""
    scene = synthetic.Scene(
        centres=np.array([[0.25, -0.1, 0.3]], np.float32),
        half_axes=np.full((1, 3), 0.06, np.float32),
        travel=np.array([[0.0, 0.1, -0.4]], np.float32),
        colours=np.array([[1.0, 0.0, 0.0]], np.float32),
    )
    orbit = cameras.orbit(7, elevation=0.3, width=64, height=64)
    times = np.linspace(0, 1, 7)
    _, alpha = synthetic.render(scene, orbit, times)
    grid = np.arange(64) + 0.5
    for i, time in enumerate(times):
        found = (alpha[i].sum(0) @ grid, alpha[i].sum(1) @ grid) / alpha[i].sum()
        expected = project(orbit[i], scene.centres_at(time)[0])
        np.testing.assert_allclose(found, expected, atol=0.3)


def test_nearer_parts_hide_farther_ones():
    scene = synthetic.Scene(
        centres=np.array([[0, 0.3, 0], [0, -0.3, 0]], np.float32),
        half_axes=np.full((2, 3), 0.1, np.float32),
        travel=np.zeros((2, 3), np.float32),
        colours=np.array([[1, 0, 0], [0, 0, 1]], np.float32),
    )
    orbit = cameras.orbit(3, width=32, height=32)  # front, back, front
    rgb, _ = synthetic.render(scene, orbit, np.zeros(3))
    front, back = rgb[0, 16, 16], rgb[1, 16, 16]
    assert front[2] > 0.3 and front[0] == 0
    assert back[0] > 0.3 and back[2] == 0


def test_a_mirrored_or_reversed_figure_differs(clip):
    mirrored = clip.static[:, :, ::-1]
    assert np.abs(clip.static[0] - mirrored[0]).mean() > 0.02
    assert np.abs(clip.static - clip.static[::-1]).mean() > 0.02
    assert np.abs(clip.static[0] - clip.static[4]).mean() > 0.02


def test_seeds_repeat_and_differ():
    settings = {"num_frames": 2, "size": 16}
    first, again = (synthetic.make_clip(5, **settings) for _ in range(2))
    np.testing.assert_array_equal(first.dynamic, again.dynamic)
    assert np.abs(first.dynamic - synthetic.make_clip(6, **settings).dynamic).max() > 0.1


def test_motion_grows_with_the_travel_and_is_zero_without():
    amounts = [
        synthetic.make_clip(1, num_frames=5, size=24, motion=factor).motion
        for factor in (0.0, 0.5, 1.0)
    ]
    assert amounts[0] == 0
    assert amounts[0] < amounts[1] < amounts[2] < 20


def test_a_time_for_every_camera():
    with pytest.raises(ValueError, match="3 cameras need as many timestamps, not 2"):
        synthetic.render(synthetic.make_scene(), cameras.orbit(3), np.zeros(2))
