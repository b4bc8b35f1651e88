"""Pinhole cameras, the orbit of the method, and the published camera JSON.

The world is Blender's: z up, the object around the origin inside a unit cube. Camera matrices are
OpenCV's: x right, y down, z forward; `world_to_camera` maps world points to camera points. Pixel
centres lie at +0.5, so the principal point of a centred camera is (width / 2, height / 2).
Angles are radians.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from d4d_jax import pytree
from d4d_jax.typing import AnyArray

#: Field of view of Blender's default camera (50 mm lens, 36 mm sensor), used by the published data.
FOV = 2 * math.atan(36 / (2 * 50))

#: Flips the y and z axes of a camera: OpenGL / Blender axes <-> OpenCV axes.
_FLIP = np.diag(np.array([1.0, -1.0, -1.0, 1.0], np.float32))


@pytree.dataclass
class Camera:
    """One pinhole camera, or a batch of them with equal image size.

    Attributes:
        world_to_camera: (*b, 4, 4), rigid, OpenCV axes.
        intrinsics: (*b, 3, 3), in pixels: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
        width: image width in pixels (static).
        height: image height in pixels (static).
    """

    world_to_camera: Float[AnyArray, "*b 4 4"]
    intrinsics: Float[AnyArray, "*b 3 3"]
    width: int = pytree.static()
    height: int = pytree.static()

    def __len__(self) -> int:
        """The number of cameras along the leading axis."""
        if self.world_to_camera.ndim < 3:
            raise TypeError("A single camera has no length.")
        return self.world_to_camera.shape[0]

    def __getitem__(self, index: Any) -> "Camera":
        """Indexes or slices the leading axis."""
        if self.world_to_camera.ndim < 3:
            raise TypeError("A single camera cannot be indexed.")
        return dataclasses.replace(
            self, world_to_camera=self.world_to_camera[index], intrinsics=self.intrinsics[index]
        )

    @property
    def camera_to_world(self) -> Float[AnyArray, "*b 4 4"]:
        """(*b, 4, 4), OpenCV axes."""
        return invert(self.world_to_camera)

    @property
    def opengl_camera_to_world(self) -> Float[AnyArray, "*b 4 4"]:
        """(*b, 4, 4), OpenGL axes (x right, y up, z backward): Blender's `matrix_world`.

        This is what VideoMV's camera embedding reads, flattened row by row.
        """
        return opencv_to_opengl(self.camera_to_world)

    @property
    def position(self) -> Float[AnyArray, "*b 3"]:
        """(*b, 3): the camera centre in the world."""
        return self.camera_to_world[..., :3, 3]

    def resized(self, width: int, height: int) -> "Camera":
        """The same view at another resolution."""
        scale = np.array([[width / self.width], [height / self.height], [1.0]], np.float32)
        return dataclasses.replace(
            self, intrinsics=self.intrinsics * scale, width=width, height=height
        )


def invert(pose: Float[AnyArray, "*b 4 4"]) -> Float[AnyArray, "*b 4 4"]:
    """The inverse of rigid transforms: camera-to-world <-> world-to-camera."""
    xp = np if isinstance(pose, np.ndarray) else jax.numpy
    rotation = xp.swapaxes(pose[..., :3, :3], -1, -2)
    translation = -rotation @ pose[..., :3, 3:]
    return xp.concatenate([xp.concatenate([rotation, translation], -1), pose[..., 3:, :]], -2)


def opengl_to_opencv(camera_to_world: Float[AnyArray, "*b 4 4"]) -> Float[AnyArray, "*b 4 4"]:
    """Turns camera-to-world matrices with OpenGL / Blender axes into ones with OpenCV axes."""
    return camera_to_world @ _FLIP


def opencv_to_opengl(camera_to_world: Float[AnyArray, "*b 4 4"]) -> Float[AnyArray, "*b 4 4"]:
    """The inverse of `opengl_to_opencv`."""
    return camera_to_world @ _FLIP


def intrinsics_from_fov(fov: float, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    """Centred intrinsics with square pixels; `fov` is the angle across the longer side.

    Raises:
        ValueError: the angle is not between 0 and pi.
    """
    if not 0 < fov < math.pi:
        raise ValueError(f"The field of view must lie between 0 and pi radians; got {fov}.")
    focal = max(width, height) / (2 * math.tan(fov / 2))
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


def look_at(
    eye: Float[AnyArray, "*b 3"],
    target: ArrayLike | Sequence[float] = (0.0, 0.0, 0.0),
    up: ArrayLike | Sequence[float] = (0.0, 0.0, 1.0),
) -> Float[np.ndarray, "*b 4 4"]:
    """World-to-camera matrices (OpenCV axes) of cameras at `eye` that look at `target` (*b, 3).

    Raises:
        ValueError: the viewing direction is parallel to `up`, or has no length.
    """
    eye, target = np.broadcast_arrays(np.asarray(eye, float), np.asarray(target, float))
    forward = target - eye
    right = np.cross(forward, up)
    if np.any(np.linalg.norm(right, axis=-1) < 1e-8):
        raise ValueError(f"A camera at {eye.tolist()} cannot look along the up axis {up}.")
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    pose = np.zeros((*eye.shape[:-1], 4, 4))
    pose[..., :3, 0] = right
    pose[..., :3, 1] = np.cross(forward, right)
    pose[..., :3, 2] = forward
    pose[..., :3, 3] = eye
    pose[..., 3, 3] = 1
    return np.linalg.inv(pose).astype(np.float32)


def orbit(
    num_views: int = 24,
    *,
    elevation: float = 0.0,
    azimuth: float = 0.0,
    distance: float = 2.0,
    fov: float = FOV,
    width: int = 256,
    height: int = 256,
    closed: bool = True,
) -> Camera:
    """The orbit of the published data: one full turn whose last view equals the first.

    View i stands at azimuth `azimuth + 2 pi i / (num_views - 1)`, counter-clockwise seen from
    above; azimuth 0 is at (0, -distance, 0), the front of the object.

    Args:
        num_views: at least 2.
        elevation: radians above the horizon. (The published script's `--elevation 30` is
            atan(30 / 180) radians, about 9.5 degrees.)
        azimuth: radians, where the orbit starts.
        distance: from the origin, in world units; the object fits a unit cube.
        fov: radians across the longer image side.
        closed: whether the last view is the first again. VideoMV's orbits are not: there the steps
            are 2 pi / num_views.

    Raises:
        ValueError: fewer than two views, or an elevation at or beyond the poles.
    """
    if num_views < 2:
        raise ValueError(f"An orbit needs at least 2 views; got {num_views}.")
    if abs(elevation) >= math.pi / 2:
        raise ValueError(f"The elevation must lie between -pi/2 and pi/2 radians; got {elevation}.")
    steps = num_views - 1 if closed else num_views
    angle = azimuth + 2 * np.pi * np.arange(num_views) / steps
    level, height_above = math.cos(elevation), math.sin(elevation)
    eye = distance * np.stack(
        [level * np.sin(angle), -level * np.cos(angle), np.full(num_views, height_above)], -1
    )
    intrinsics = intrinsics_from_fov(fov, width, height)
    return Camera(
        world_to_camera=look_at(eye),
        intrinsics=np.tile(intrinsics, (num_views, 1, 1)),
        width=width,
        height=height,
    )


def to_json(camera: Camera) -> dict[str, Any]:
    """One camera in the published format: Blender's matrix, OpenCV axes in world space, the fov."""
    matrix = np.asarray(camera.opengl_camera_to_world, float)
    size = np.array([camera.width, camera.height])
    focal = np.asarray(camera.intrinsics, float)[[0, 1], [0, 1]]
    x_fov, y_fov = (2 * np.arctan(size / (2 * focal))).tolist()
    return {
        "format_version": 6,
        "matrix_world": matrix.tolist(),
        "x": matrix[:3, 0].tolist(),
        "y": (-matrix[:3, 1]).tolist(),
        "z": (-matrix[:3, 2]).tolist(),
        "origin": matrix[:3, 3].tolist(),
        "x_fov": x_fov,
        "y_fov": y_fov,
    }


def from_json(record: Mapping[str, Any], width: int, height: int) -> Camera:
    """Reads one camera of the published format, for images of the given size.

    The pose is read from `x`, `y`, `z`, `origin` (OpenCV axes in world space), or from
    `matrix_world` (Blender axes) where those are absent.

    Raises:
        ValueError: keys are missing, a value is no finite number or out of range, or the axes are
            not orthonormal.
    """
    by_axes = {"x", "y", "z", "origin"} <= set(record)
    if not {"x_fov", "y_fov"} <= set(record) or not (by_axes or "matrix_world" in record):
        raise ValueError(
            "A camera needs x_fov, y_fov and either matrix_world or x, y, z and origin; got only"
            f" {sorted(record)}."
        )
    for name in ("x_fov", "y_fov"):
        fov = record[name]
        if not isinstance(fov, int | float) or not 0 < fov < math.pi:
            raise ValueError(f"{name} must lie between 0 and pi radians; got {fov!r}.")
    if by_axes:
        pose = np.eye(4, dtype=np.float32)
        pose[:3] = np.stack([_numbers(record, key, 3) for key in ("x", "y", "z", "origin")], 1)
    else:
        pose = opengl_to_opencv(_numbers(record, "matrix_world", 4, 4))
    rotation = pose[:3, :3]
    if not np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise ValueError(f"The camera axes are not a rotation: {rotation.tolist()}.")
    intrinsics = np.array(
        [
            [width / (2 * math.tan(record["x_fov"] / 2)), 0, width / 2],
            [0, height / (2 * math.tan(record["y_fov"] / 2)), height / 2],
            [0, 0, 1],
        ],
        np.float32,
    )
    return Camera(invert(pose), intrinsics, width, height)


def _numbers(record: Mapping[str, Any], key: str, *shape: int) -> np.ndarray:
    """The array `record[key]`, checked."""
    try:
        values = np.asarray(record[key], np.float32)
    except (TypeError, ValueError):
        values = np.full((), np.nan)
    if values.shape != shape or not np.isfinite(values).all():
        wanted = " x ".join(map(str, shape))
        raise ValueError(f"{key} must be {wanted} finite numbers; got {record[key]!r}.")
    return values


def stack(cameras: list[Camera]) -> Camera:
    """Stacks single cameras of equal image size along a new leading axis.

    Raises:
        ValueError: no cameras, or different image sizes.
    """
    sizes = sorted({(camera.width, camera.height) for camera in cameras})
    if len(sizes) != 1:
        raise ValueError(f"Cameras to stack need one common image size; got {sizes}.")
    return Camera(
        np.stack([np.asarray(camera.world_to_camera) for camera in cameras]),
        np.stack([np.asarray(camera.intrinsics) for camera in cameras]),
        *sizes[0],
    )
