"""Where the object of a capture stands in the world of its files, and how large it is.

Fields cover the cube [-0.75, 0.75]^3, and the methods of this library were tuned on objects in a
unit cube around the origin with cameras about two units away. `locate` finds the centre and the
scale that bring any other capture there; the rotation of the world stays as it is.
"""

import logging

import numpy as np
from jaxtyping import Float

from d4d_jax.typing import Alpha

_LOGGER = logging.getLogger(__name__)

#: What silhouettes are scaled to: the radius of a ball in the unit cube.
RADIUS = 0.5

#: What the mean distance of the cameras is scaled to where there are no silhouettes.
DISTANCE = 2.0

#: Of the radii that the views see, the one taken: a few bad masks do not count.
_QUANTILE = 0.95

#: Mean squared sine of the angles between the axes below which they count as parallel (2 degrees).
_PARALLEL = 1e-3

_SAMPLES = 128  # of a mask, along each side


def locate(
    poses: Float[np.ndarray, "v 4 4"],
    intrinsics: Float[np.ndarray, "v 3 3"],
    alpha: Alpha | None,
) -> tuple[Float[np.ndarray, "3"], float]:
    """The centre of the object, and the scale that makes it fit: p_here = (p - centre) * scale.

    With silhouettes, the centre is the point nearest to the rays through their middles (least
    squares), and the object is as large as the ball around it that they show. Without, it is the
    point nearest to the optical axes, and the mean distance to the cameras becomes 2.

    Parallel axes have no nearest point. Then the centre is the point of their mean that is nearest
    to the origin of the files; if that lies behind a single, resting camera, whose distance is
    arbitrary, it is two units in front of it.

    Args:
        poses: camera-to-world, OpenCV axes.
        intrinsics: in pixels of the masks.
        alpha: of the views, or None when unknown.

    Raises:
        ValueError: the cameras look away from the centre, or it cannot be told from them.
    """
    poses, intrinsics = np.asarray(poses, float), np.asarray(intrinsics, float)
    origins, axes = poses[:, :3, 3], poses[:, :3, 2]
    outlines: dict[int, np.ndarray] = {}
    if alpha is not None:
        for view, mask in enumerate(alpha):
            rays = _silhouette_rays(mask, poses[view], intrinsics[view])
            if rays is not None:
                outlines[view] = rays
    if not outlines:
        centre = _nearest_point(origins, axes)
        distance = np.linalg.norm(origins - centre, axis=-1).mean()
        return centre, float(DISTANCE / distance)
    views = list(outlines)
    middles = np.stack([outlines[view][0] for view in views])
    centre = _nearest_point(origins[views], middles)
    radii = [
        np.linalg.norm(np.cross(rays[1:], centre - origins[view]), axis=-1).max()
        for view, rays in outlines.items()
    ]
    return centre, float(RADIUS / np.quantile(radii, _QUANTILE))


def _silhouette_rays(
    mask: Float[np.ndarray, "h w"], pose: Float[np.ndarray, "4 4"], k: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "n 3"] | None:
    """Unit directions in the world: the middle of the silhouette, then all of it; None if empty."""
    step = max(1, max(mask.shape) // _SAMPLES)
    rows, columns = np.nonzero(np.asarray(mask)[::step, ::step] > 0.5)
    if not len(rows):
        return None
    pixels = np.stack([columns, rows], -1) * step + 0.5
    pixels = np.concatenate([(pixels.min(0) + pixels.max(0))[None] / 2, pixels])
    directions = np.concatenate([(pixels - k[:2, 2]) / k[[0, 1], [0, 1]], pixels[:, :1] ** 0], 1)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return directions @ pose[:3, :3].T


def _nearest_point(
    origins: Float[np.ndarray, "v 3"], axes: Float[np.ndarray, "v 3"]
) -> Float[np.ndarray, "3"]:
    """The point with the least sum of squared distances to lines, in front of their origins."""
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    matrix = across.mean(0)
    if np.linalg.eigvalsh(matrix)[0] > _PARALLEL:
        centre = np.linalg.solve(matrix, (across @ origins[..., None]).mean(0)[:, 0])
        if np.median(((centre - origins) * axes).sum(-1)) <= 0:
            raise ValueError(
                "The cameras look away from each other, not at one object between them; leave the"
                " world of the files as it is with normalise=False."
            )
        return centre
    origin, axis = origins.mean(0), axes.mean(0) / np.linalg.norm(axes.mean(0))
    depth = float(-origin @ axis)
    spread = float(np.linalg.norm(origins - origin, axis=-1).max())
    if depth <= spread or depth < 1e-6:
        if spread > 1e-6:
            raise ValueError(
                "The cameras look in parallel, so that the distance of the object cannot be told"
                " from them; put the origin of the world at it, or leave the world of the files as"
                " it is with normalise=False."
            )
        depth = DISTANCE
    _LOGGER.warning(
        "The cameras look in parallel; the object is taken to be %.3g units in front of them.",
        depth,
    )
    return origin + depth * axis
