"""gaussians.sh: the basis is orthonormal, has the published signs, and colours are cut at 0."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians import sh

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rasterizer_gsplat.npz"


def test_basis_is_orthonormal_on_the_sphere():
    heights, weights = np.polynomial.legendre.leggauss(8)
    angles = 2 * np.pi * np.arange(16) / 16
    z, angle = np.meshgrid(heights, angles, indexing="ij")
    rim = np.sqrt(1 - z * z)
    directions = np.stack([rim * np.cos(angle), rim * np.sin(angle), z], axis=-1)
    values = np.asarray(sh.basis(directions.reshape(-1, 3).astype(np.float32), 3))
    area = np.repeat(weights, 16) * 2 * np.pi / 16
    np.testing.assert_allclose(values.T @ (values * area[:, None]), np.eye(16), atol=2e-6)


def test_published_signs():
    x, y, z = np.eye(3, dtype=np.float32)
    c1 = 0.4886025119029199
    np.testing.assert_allclose(sh.basis(x, 1)[1:], [0, 0, -c1], atol=1e-7)
    np.testing.assert_allclose(sh.basis(y, 1)[1:], [-c1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(sh.basis(z, 1)[1:], [0, c1, 0], atol=1e-7)
    # Terms in the published order: xy, yz, 2zz-xx-yy, xz, xx-yy at a direction without symmetry.
    u, v, w = np.array([1.0, 2.0, -2.0]) / 3
    expected = [
        1.0925484305920792 * u * v,
        -1.0925484305920792 * v * w,
        0.31539156525252005 * (2 * w * w - u * u - v * v),
        -1.0925484305920792 * u * w,
        0.5462742152960396 * (u * u - v * v),
    ]
    direction = np.array([u, v, w], np.float32)
    np.testing.assert_allclose(sh.basis(direction, 2)[4:], expected, atol=1e-6)


@pytest.mark.parity
def test_colours_agree_with_gsplat():
    golden = np.load(GOLDEN)
    pose = golden["world_to_camera"].astype(float)
    offsets = golden["means"] + pose[:3, :3].T @ pose[:3, 3]
    directions = offsets / np.linalg.norm(offsets, axis=-1, keepdims=True)
    colours = sh.to_rgb(golden["sh"], directions.astype(np.float32))
    np.testing.assert_allclose(colours, golden["colours"], atol=1e-6)


def test_dc_round_trip_and_lower_degree():
    rgb = np.array([[0.1, 0.5, 0.9]], np.float32)
    coefficients = jnp.concatenate([sh.from_rgb(rgb)[:, None], jnp.ones((1, 3, 3))], axis=1)
    direction = np.array([[0.6, 0.0, 0.8]], np.float32)
    np.testing.assert_allclose(sh.to_rgb(coefficients, direction, 0), rgb, atol=1e-6)
    assert np.abs(sh.to_rgb(coefficients, direction) - rgb).max() > 0.05


def test_negative_colours_are_cut_without_gradient():
    direction = np.array([0.0, 0.0, 1.0], np.float32)

    def total(coefficients):
        return sh.to_rgb(coefficients, direction).sum()

    coefficients = sh.from_rgb(jnp.array([[-0.5, 0.5, 2.0]]))
    np.testing.assert_allclose(sh.to_rgb(coefficients, direction), [0.0, 0.5, 2.0], atol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(coefficients), [[0.0, sh.C0, sh.C0]], rtol=1e-6)


def test_wrong_degrees_are_named():
    direction = np.array([0.0, 0.0, 1.0], np.float32)
    with pytest.raises(ValueError, match="degree 4 is outside"):
        sh.basis(direction, 4)
    with pytest.raises(ValueError, match="5 spherical-harmonic coefficients belong to no degree"):
        sh.degree_of(5)
    with pytest.raises(ValueError, match=r"Degree 2 was asked for.*only degree 1"):
        sh.to_rgb(jnp.zeros((4, 3)), direction, 2)
