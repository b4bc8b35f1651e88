"""Projection of 3D Gaussians to the image plane: elliptical weighted averaging (EWA).

Zwicker et al. 2001 as used by 3D Gaussian Splatting (Kerbl et al. 2023): the perspective map is
linearised at each centre, cov2d = J W Sigma W^T J^T, and `blur` px^2 is added on the diagonal.
Camera axes are OpenCV's (x right, y down, z forward); pixel centres lie at +0.5.

Everything here is plain differentiable JAX. Splats that cannot be drawn (behind the near plane, not
finite, degenerate) are replaced by a harmless one *before* the arithmetic, so they produce neither
NaN values nor NaN gradients, and are marked in `visible`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from d4d_jax.cameras import Camera
from d4d_jax.typing import AnyArray

NEAR = 0.2
BLUR = 0.3
_FOV_MARGIN = 0.3  # in units of tan(fov / 2): the Jacobian is taken at most this far off-screen
_MAX_LOG_SCALE = 10.0  # beyond it a covariance squared leaves the range of float32
_MAX_DISTANCE = 1e9
_MIN_NORM_SQUARED = 1e-20
_MIN_COMPENSATION = 0.005  # keeps the square root differentiable; gsplat's floor


def scaled_blur(scale: float) -> float:
    """The screen-space blur, px^2, of images resized by area averaging to `scale` times their side.

    As wide in the scene as at full size. Averaging blurs an image further, but not its splats: of
    an opaque surface that many splats make up, wider splats widen the silhouette, and a fit moves
    it away from the camera to make up for that.
    """
    return BLUR * scale**2


class Projection(NamedTuple):
    """What the image plane sees of n splats.

    means2d: Centres in pixels.
    factors: The inverse covariance as (p, s, r), see `gaussians.rasterize.ScreenSplats`.
    variances: Diagonal (xx, yy) of the blurred covariance, px^2.
    depths: Camera z.
    compensations: sqrt(|cov2d| / |blurred cov2d|) in [0.005, 1], the share of opacity that a splat
        keeps when the blur must not add light (Yu et al. 2024, Mip-Splatting, Eq. 9).
    visible: Whether the numbers mean anything; invisible splats hold finite stand-ins.
    """

    means2d: Float[Array, "n 2"]
    factors: Float[Array, "n 3"]
    variances: Float[Array, "n 2"]
    depths: Float[Array, "n"]
    compensations: Float[Array, "n"]
    visible: Bool[Array, "n"]


def rotation_matrices(quaternions: Float[AnyArray, "n 4"]) -> Float[Array, "n 3 3"]:
    """Rotation matrices of w x y z quaternions of any norm; the zero quaternion is the identity."""
    squared = jnp.sum(quaternions * quaternions, axis=-1, keepdims=True)
    degenerate = squared < _MIN_NORM_SQUARED
    identity = jnp.array([1.0, 0.0, 0.0, 0.0], quaternions.dtype)
    unit = jnp.where(degenerate, identity, quaternions) * lax.rsqrt(
        jnp.where(degenerate, 1.0, squared)
    )
    w, x, y, z = unit[:, 0], unit[:, 1], unit[:, 2], unit[:, 3]
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def project(
    means: Float[AnyArray, "n 3"],
    log_scales: Float[AnyArray, "n 3"],
    quaternions: Float[AnyArray, "n 4"],
    camera: Camera,
    active: Bool[AnyArray, "n"] | bool = True,
    *,
    blur: float | Float[AnyArray, ""] = BLUR,
    near: float | Float[AnyArray, ""] = NEAR,
    far: float | Float[AnyArray, ""] = math.inf,
) -> Projection:
    """Projects splats into one camera.

    Args:
        means, log_scales, quaternions: As in `gaussians.types.Splats`.
        camera: One camera (no leading axes), skew 0; the principal point may lie anywhere.
        active: Splats without it are invisible, whatever their numbers.
        blur: Added to both variances, px^2. It stands for the pixel's own extent at full
            resolution: to see in a w-pixel image what a W-pixel image shows, scale it by (w/W)^2.
        near: Splats with z at or below this, or behind the camera, are invisible.
        far: Splats with z at or above this are invisible.
    """
    means, log_scales, quaternions = map(jnp.asarray, (means, log_scales, quaternions))
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    focal = jnp.stack([camera.intrinsics[0, 0], camera.intrinsics[1, 1]])
    centre = camera.intrinsics[:2, 2]
    size = jnp.array([camera.width, camera.height], means.dtype)

    known = jnp.all(jnp.isfinite(means), axis=-1) & active
    points = jnp.where(known[:, None], means, 0.0) @ rotation.T + translation
    visible = (
        (points[:, 2] > jnp.maximum(near, 0.0))
        & (points[:, 2] < far)
        & jnp.all(jnp.abs(points) < _MAX_DISTANCE, axis=-1)
        & jnp.all(log_scales < _MAX_LOG_SCALE, axis=-1)
        & jnp.all(jnp.isfinite(quaternions), axis=-1)
        & known
    )
    seen = visible[:, None]
    points = jnp.where(seen, points, jnp.array([0.0, 0.0, 1.0], means.dtype))
    scales = jnp.exp(jnp.where(seen, log_scales, 0.0))
    quaternions = jnp.where(seen, quaternions, 0.0)

    depths = _repeated(points[:, 2:], 2)
    slopes = points[:, :2] / depths
    means2d = focal * slopes + centre
    margin = _FOV_MARGIN * 0.5 * size / focal
    clamped = jnp.clip(slopes, -centre / focal - margin, (size - centre) / focal + margin)

    # Rows of J W, then of J W R S: the Gram matrix of the latter is the covariance in pixels.
    zooms = focal / depths
    rotations = rotation_matrices(quaternions)
    axes = []
    for i in range(2):
        slope, zoom = (_repeated(column[:, i : i + 1], 3) for column in (clamped, zooms))
        row = zoom * (rotation[i] - slope * rotation[2])
        turned = sum(_repeated(row[:, j : j + 1], 3) * rotations[:, j] for j in range(3))
        axes.append(turned * scales)
    x_axis, y_axis = axes
    xx, yy, xy = _dot(x_axis, x_axis) + blur, _dot(y_axis, y_axis) + blur, _dot(x_axis, y_axis)
    # xx yy - xy^2 loses every digit for long needles; Lagrange's identity subtracts nothing large.
    cross = jnp.cross(x_axis, y_axis)
    unblurred = _dot(cross, cross)
    determinant = unblurred + blur * (xx + yy - blur)
    invertible = (determinant > 0.0) & jnp.isfinite(determinant) & (xx > 0.0) & (yy > 0.0)
    invertible &= jnp.all(jnp.isfinite(means2d), axis=-1)
    means2d = jnp.where(invertible[:, None], means2d, 0.0)
    xx = jnp.where(invertible, xx, 1.0)
    determinant, yy = (jnp.where(invertible, value, 1.0) for value in (determinant, yy))
    kept = jnp.maximum(unblurred / determinant, _MIN_COMPENSATION**2)
    factors = jnp.stack([yy / determinant, -xy / yy, 1.0 / yy], axis=-1)
    return Projection(
        means2d=means2d,
        factors=jnp.where(invertible[:, None], factors, 1.0),
        variances=jnp.stack([xx, yy], axis=-1),
        depths=points[:, 2],
        compensations=jnp.sqrt(kept),
        visible=visible & invertible,
    )


# XLA's CPU backend reduces a short axis an element at a time, and the gradient of broadcasting is a
# reduction. Written without them the gradient of the whole projection takes 2/3 of the time.
def _repeated(column: Float[Array, "n 1"], times: int) -> Float[Array, "n times"]:
    return jnp.concatenate([column] * times, axis=-1)


def _dot(a: Float[Array, "n 3"], b: Float[Array, "n 3"]) -> Float[Array, "n"]:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]
