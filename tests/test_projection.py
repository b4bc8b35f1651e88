"""gaussians.projection: against the exact pinhole map, gsplat, and splats that break it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.cameras import look_at
from gaussians.projection import BLUR, project, rotation_matrices, scaled_blur
from gaussians.rasterize import rasterize
from gaussians.types import Camera, Splats

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rasterizer_gsplat.npz"


def inverses(projection) -> np.ndarray:
    """(xx, xy, yy) of the inverse covariances."""
    p, s, r = np.asarray(projection.factors, float).T
    return np.stack([p, p * s, p * s * s + r], axis=-1)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def camera(golden):
    return Camera(golden["world_to_camera"], golden["intrinsics"], 41, 27)


def test_rotation_matrices_turn_like_the_quaternion():
    half = np.deg2rad(30.0) / 2
    about_z = np.array([[np.cos(half), 0, 0, np.sin(half)], [0, 0, 0, 0]], np.float32) * 3.0
    turned = rotation_matrices(jnp.asarray(about_z))
    c, s = np.cos(np.deg2rad(30.0)), np.sin(np.deg2rad(30.0))
    np.testing.assert_allclose(turned[0], [[c, -s, 0], [s, c, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_array_equal(turned[1], np.eye(3))


def test_covariance_is_the_linearised_pinhole(golden, camera):
    """cov2d = D Sigma D^T + blur with D = the derivative of the exact map, for splats in view."""
    got = project(golden["means"], golden["log_scales"], golden["quaternions"], camera, blur=0.5)

    def pixel(point):
        inside = camera.world_to_camera[:3, :3] @ point + camera.world_to_camera[:3, 3]
        image = camera.intrinsics @ inside
        return image[:2] / image[2]

    in_view = (golden["depths"] > 0.2) & np.all(
        (golden["means2d"] > 0) & (golden["means2d"] < [41, 27]), axis=-1
    )
    assert in_view.sum() > 20
    jacobian = jax.jit(jax.jacobian(pixel))
    for k in np.flatnonzero(in_view):
        rotation = np.asarray(rotation_matrices(golden["quaternions"][k : k + 1])[0], float)
        sigma = rotation @ np.diag(np.exp(2.0 * golden["log_scales"][k])) @ rotation.T
        derivative = np.asarray(jacobian(golden["means"][k]), float)
        covariance = derivative @ sigma @ derivative.T + 0.5 * np.eye(2)
        inverse = np.linalg.inv(covariance)
        np.testing.assert_allclose(got.means2d[k], pixel(golden["means"][k]), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(got.variances[k], np.diag(covariance), rtol=1e-4)
        np.testing.assert_allclose(
            inverses(got)[k], inverse[[0, 0, 1], [0, 1, 1]], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parity
def test_agrees_with_gsplat_even_beside_the_image(golden, camera):
    got = project(golden["means"], golden["log_scales"], golden["quaternions"], camera)
    front = golden["depths"] > 0.2
    np.testing.assert_array_equal(got.visible, front)
    assert 0 < np.sum(~front)
    np.testing.assert_allclose(got.depths[front], golden["depths"][front], rtol=1e-6)
    np.testing.assert_allclose(got.means2d[front], golden["means2d"][front], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(inverses(got)[front], golden["conics"][front], rtol=1e-4, atol=1e-6)


def test_long_needle_keeps_its_digits():
    camera = Camera(np.eye(4, dtype=np.float32), np.diag([300.0, 300.0, 1.0]).astype("f"), 64, 64)
    turn = np.deg2rad(45.0) / 2
    got = project(
        np.array([[0.0, 0.0, 2.0]], np.float32),
        np.log(np.array([[50.0, 1e-3, 1e-3]], np.float32)),
        np.array([[np.cos(turn), 0.0, 0.0, np.sin(turn)]], np.float32),
        camera,
    )
    narrow, wide = (150 * 1e-3) ** 2 + 0.3, (150 * 50.0) ** 2 + 0.3
    xx, xy, yy = inverses(got)[0]
    np.testing.assert_allclose(xx + yy, 1 / narrow + 1 / wide, rtol=1e-5)
    np.testing.assert_allclose(xx - xy, 1 / narrow, rtol=1e-5)


def test_unusable_splats_are_invisible_and_poison_nothing():
    camera = Camera(np.eye(4, dtype=np.float32), np.diag([50.0, 50.0, 1.0]).astype("f"), 32, 32)
    means = np.array(
        [[0, 0, 2], [0, 0, 0], [0, 0, 0.2], [1, 1, -3], [0, 0, 2], [np.nan, 0, 2], [1e30, 0, 2]],
        np.float32,
    )
    log_scales = np.full((7, 3), -3.0, np.float32)
    log_scales[4] = 80.0
    quaternions = np.zeros((7, 4), np.float32)  # the first one too: the identity

    def total(means, log_scales, quaternions):
        got = project(means, log_scales, quaternions, camera)
        finite = [jnp.where(got.visible[:, None], x, 0.0) for x in (got.means2d, got.factors)]
        return sum(x.sum() for x in finite) + jnp.where(got.visible, got.depths, 0.0).sum()

    got = project(means, log_scales, quaternions, camera)
    np.testing.assert_array_equal(got.visible, [True] + [False] * 6)
    assert all(np.isfinite(leaf).all() for leaf in got)
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(means, log_scales, quaternions)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1:], 0.0)


def test_degenerate_footprint_without_blur_is_invisible():
    camera = Camera(np.eye(4, dtype=np.float32), np.diag([50.0, 50.0, 1.0]).astype("f"), 32, 32)
    args = (
        np.array([[0, 0, 2.0]], np.float32),
        np.full((1, 3), -100.0, np.float32),
        np.ones((1, 4), np.float32),
    )
    assert not project(*args, camera, blur=0.0).visible[0]
    assert project(*args, camera).visible[0]


def test_blur_may_be_traced():
    camera = Camera(np.eye(4, dtype=np.float32), np.diag([50.0, 50.0, 1.0]).astype("f"), 32, 32)
    args = (
        np.array([[0, 0, 2.0]], np.float32),
        np.full((1, 3), -3.0, np.float32),
        np.ones((1, 4), np.float32),
    )
    width = jax.jit(lambda blur: project(*args, camera, blur=blur).variances[0, 0])
    np.testing.assert_allclose(width(jnp.float32(1.3)) - width(jnp.float32(0.3)), 1.0, rtol=1e-5)


def test_the_silhouette_of_an_opaque_object_is_as_wide_at_half_the_size():
    """The area that many small splats cover, beside that of the averaged image of full size."""
    n = 1500
    means = np.random.default_rng(0).uniform(-0.3, 0.3, (n, 3)).astype(np.float32)
    means[:, 2] *= 0.2  # a slab
    splats = Splats(
        means=means,
        log_scales=np.full((n, 3), np.log(0.02), np.float32),
        quaternions=np.eye(1, 4, dtype=np.float32).repeat(n, axis=0),
        opacity_logits=np.full(n, 4.0, np.float32),
        sh=np.zeros((n, 1, 3), np.float32),
        active=np.ones(n, bool),
    )
    pose = look_at(np.array([0.1, -0.2, 2.0]))
    whole = np.array([[90, 0, 32], [0, 90, 32], [0, 0, 1]], np.float32)
    half = whole * np.array([[0.5], [0.5], [1]], np.float32)

    def area(intrinsics, size, blur):
        camera = Camera(pose, intrinsics, size, size)
        render = rasterize(splats, camera, np.ones(3, np.float32), capacity=2**16, blur=blur)
        return float(render.alpha.mean())

    expected = area(whole, 64, BLUR)
    error, naive = (abs(area(half, 32, blur) / expected - 1) for blur in (scaled_blur(0.5), BLUR))
    assert scaled_blur(1.0) == BLUR
    assert error < 0.01 < naive
