import jax
import numpy as np
import pytest

from d4d_jax.cameras import orbit
from gaussians import initialize
from gaussians.sh import C0

KEY = jax.random.key(0)
RADIUS, CENTER = 0.3, np.array([0.1, -0.05, 0.08])


def ball_views(size: int, num_views: int):
    """An orbit around a ball off the centre: red where x > 0.1, blue elsewhere, on white."""
    camera = orbit(num_views, width=size, height=size)
    pose = np.asarray(camera.camera_to_world, float)
    focal = float(camera.intrinsics[0, 0, 0])
    pixel = (np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1) + 0.5 - size / 2) / focal
    rays = np.concatenate([pixel, np.ones((size, size, 1))], -1)
    rays = np.einsum("vij,hwj->vhwi", pose[:, :3, :3], rays)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    start = (pose[:, :3, 3] - CENTER)[:, None, None]
    along = (rays * start).sum(-1)
    square = along**2 - (start**2).sum(-1) + RADIUS**2
    hit = start - (along + np.sqrt(np.maximum(square, 0)))[..., None] * rays
    red, blue = np.array([0.9, 0.1, 0.1]), np.array([0.1, 0.1, 0.8])
    alpha = (square > 0).astype(np.float32)
    image = np.where(hit[..., :1] > 0, red, blue) * alpha[..., None] + 1 - alpha[..., None]
    return image.astype(np.float32), alpha, camera


@pytest.fixture(scope="module")
def ball():
    return ball_views(96, 13)


def hull(views, **options):
    arguments = {"num_splats": 800, "key": KEY, "resolution": 48} | options
    return initialize.visual_hull(*views, **arguments)


def reach(splats) -> np.ndarray:
    """How far from the ball's centre the visible part of each active splat ends."""
    active = np.asarray(splats.active)
    distances = np.linalg.norm(np.asarray(splats.means)[active] - CENTER, axis=-1)
    return distances + 1.5 * np.exp(np.asarray(splats.log_scales)[active, 0])


def test_hull_of_a_ball_is_a_ball_with_its_colours(ball):
    splats = hull(ball)
    assert len(splats) == 800 and bool(splats.active.all())
    # The hull of a level orbit has small caps on its poles, above the ball.
    assert abs(np.median(reach(splats)) - RADIUS) < 0.012
    assert reach(splats).min() > RADIUS - 0.03
    colours = 0.5 + C0 * np.asarray(splats.sh[:, 0])
    side = np.asarray(splats.means)[:, 0] - CENTER[0]
    np.testing.assert_allclose(colours[side > 0.1].mean(0), [0.9, 0.1, 0.1], atol=0.03)
    np.testing.assert_allclose(colours[side < -0.1].mean(0), [0.1, 0.1, 0.8], atol=0.03)
    np.testing.assert_allclose(jax.nn.sigmoid(splats.opacity_logits), 0.8, rtol=1e-5)
    widths = np.exp(np.asarray(splats.log_scales))
    spacing = np.sqrt(4 * np.pi * RADIUS**2 / 800)
    assert 0.3 * spacing < widths.mean() < 1.2 * spacing


def test_the_same_key_gives_the_same_splats(ball):
    jax.tree.map(np.testing.assert_array_equal, hull(ball), hull(ball))
    other = hull(ball, key=jax.random.key(1))
    assert not np.array_equal(other.means, hull(ball).means)


def test_capacity_leaves_inactive_rows_and_sh_degree_their_coefficients(ball):
    splats = hull(ball, capacity=1000, sh_degree=2)
    np.testing.assert_array_equal(splats.active, np.arange(1000) < 800)
    assert splats.sh.shape == (1000, 9, 3)
    assert not np.asarray(splats.sh[:, 1:]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(splats))


def test_more_splats_than_surface_voxels(ball):
    splats = hull(ball, num_splats=3000, resolution=12)
    assert len(np.unique(np.asarray(splats.means), axis=0)) == 3000


def test_tolerance_carves_noisy_masks(ball):
    images, alphas, camera = ball
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(alphas.shape) < 0.08, 1 - alphas, alphas).astype(np.float32)
    strict = reach(hull((images, noisy, camera)))
    tolerant = reach(hull((images, noisy, camera), tolerance=4))
    # Strictly carved, a noisy body is full of holes, whose walls are surface too.
    assert (strict < 0.9 * RADIUS).mean() > 0.3
    assert (tolerant < 0.9 * RADIUS).mean() < 0.05


def test_two_small_views_are_enough():
    images, alphas, camera = ball_views(32, 5)
    splats = hull((images[:2], alphas[:2], camera[:2]), num_splats=200)
    inside = reach(splats)
    assert np.median(inside) < 1.4 * RADIUS and inside.max() < 2.2 * RADIUS


def test_a_body_cut_by_the_image_border_is_not_carved_away():
    images, alphas, camera = ball_views(64, 13)
    focal = camera.intrinsics.copy()
    focal[:, :2, 2] -= 16  # the right and lower quarter fall out of the image
    cropped = type(camera)(camera.world_to_camera, focal, 32, 32)
    splats = hull((images[:, 16:48, 16:48], alphas[:, 16:48, 16:48], cropped), half_extent=0.5)
    assert abs(np.median(reach(splats)) - RADIUS) < 0.05


def test_carve_counts_misses():
    camera = orbit(5, width=8, height=8)
    masks = np.ones((5, 8, 8), bool)
    masks[0] = False
    points = np.array([[0.0, 0, 0], [0, -5, 0]], np.float32)  # the second is behind camera 0
    np.testing.assert_array_equal(initialize.carve(points, masks, camera), [False, False])
    np.testing.assert_array_equal(initialize.carve(points, masks, camera, 1), [True, False])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"alphas": None}, "needs the alpha masks of the views and got none"),
        ({"alphas": np.zeros((4, 8, 8), np.float32)}, r"masks of views \[0, 1, 2, 3\] are empty"),
        ({"camera": orbit(4, width=9, height=8)}, r"\(4, 8, 9\), but the images"),
        ({"num_splats": 2}, "at least 4 splats; got num_splats=2"),
        ({"tolerance": 4}, "below the 4 views; got 4"),
        ({"capacity": 7}, "raise it"),
        ({"opacity": 1.0}, "outside"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(change, sentence):
    arguments = {
        "images": np.ones((4, 8, 8, 3), np.float32),
        "alphas": np.ones((4, 8, 8), np.float32),
        "camera": orbit(4, width=8, height=8),
        "num_splats": 10,
        "key": KEY,
        "resolution": 8,
    }
    with pytest.raises(ValueError, match=sentence):
        initialize.visual_hull(**(arguments | change))


def test_random_cube_fills_its_cube_evenly():
    splats = initialize.random_cube(500, key=KEY, half_extent=1.3, capacity=600)
    means = np.asarray(splats.means)[:500]
    assert np.abs(means).max() <= 1.3 and np.abs(means).max() > 1.25
    np.testing.assert_allclose(means.mean(axis=0), 0, atol=0.15)
    np.testing.assert_array_equal(splats.active, np.arange(600) < 500)
    np.testing.assert_allclose(jax.nn.sigmoid(splats.opacity_logits[:500]), 0.1, rtol=1e-5)
    expected = np.log(initialize.nearest_distances(means, 3).mean(axis=1))
    np.testing.assert_allclose(splats.log_scales[:500, 0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 4 splats"):
        initialize.random_cube(3, key=KEY)


def test_point_cloud_survives_points_that_coincide():
    points = np.zeros((6, 3), np.float32)
    splats = initialize.point_cloud(points)
    np.testing.assert_allclose(np.exp(splats.log_scales), 3e-4, rtol=1e-4)
    np.testing.assert_array_equal(splats.sh, 0)


def test_nearest_distances():
    points = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    pairwise = np.sort(np.linalg.norm(points[:, None] - points[None], axis=-1), axis=1)
    np.testing.assert_allclose(initialize.nearest_distances(points, 4), pairwise[:, 1:5], rtol=1e-5)
    with pytest.raises(ValueError, match="3 points do not have 3 neighbours"):
        initialize.nearest_distances(points[:3], 3)
    with pytest.raises(ValueError, match="not finite"):
        initialize.nearest_distances(np.full((9, 3), np.nan, np.float32), 3)
