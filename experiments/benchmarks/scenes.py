"""What the rasterizer suite draws."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from d4d_jax import cameras
from gaussians import sh
from gaussians.types import Camera, Splats

#: Radius of the ball that the centres fill: all of it, or as much as a normalised object.
RADII = {"ball": 1.0, "object": 0.5}
_EYE = (0.2618, 0.7, 2.0)  # elevation and azimuth in radians, distance
_SIGMA = (0.6, 1.8)  # range of the standard deviations in px of a 256 px image at the origin


class Scene(NamedTuple):
    """n splats of SH degree 0, who sees them, and the cotangent (size, size, 3) of the image."""

    splats: Splats
    camera: Camera
    cotangent: np.ndarray
    background: np.ndarray


def ball(kind: str, n: int, size: int) -> Scene:
    """Random splats in a ball, seen by the published data's camera; the same on every call.

    Opacities are uniform in (0.1, 0.9), standard deviations log-uniform axis by axis. They are
    fixed in world units, so a larger image shows the same splats over more pixels.

    Args:
        kind: a key of `RADII`.
        n: number of splats.
        size: width and height in pixels.
    """
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    means = RADII[kind] * directions * rng.uniform(size=(n, 1)) ** (1 / 3)
    elevation, azimuth, distance = _EYE
    pixel = distance / cameras.intrinsics_from_fov(cameras.FOV, 256, 256)[0, 0]
    log_scales = rng.uniform(*np.log(_SIGMA), size=(n, 3)) + np.log(pixel)
    quaternions = rng.normal(size=(n, 4))
    opacities = rng.uniform(0.1, 0.9, size=n)
    colours = rng.uniform(size=(n, 1, 3))
    level, height = math.cos(elevation), math.sin(elevation)
    eye = distance * np.array([level * math.cos(azimuth), level * math.sin(azimuth), height])
    splats = Splats(
        means=jnp.asarray(means, jnp.float32),
        log_scales=jnp.asarray(log_scales, jnp.float32),
        quaternions=jnp.asarray(quaternions, jnp.float32),
        opacity_logits=jnp.asarray(np.log(opacities / (1 - opacities)), jnp.float32),
        sh=sh.from_rgb(jnp.asarray(colours, jnp.float32)),
        active=jnp.ones(n, bool),
    )
    intrinsics = cameras.intrinsics_from_fov(cameras.FOV, size, size)
    camera = Camera(cameras.look_at(eye), intrinsics, size, size)
    cotangent = rng.normal(size=(size, size, 3)).astype(np.float32)
    return Scene(splats, camera, cotangent, np.ones(3, np.float32))
