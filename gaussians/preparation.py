"""What a reconstruction derives from its frames before the first step: views, first splats."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from d4d_jax.clips import Color, OrbitClip
from gaussians import initialize
from gaussians.captures import Capture, Views
from gaussians.deformation import Deformation
from gaussians.types import Splats

_LOGGER = logging.getLogger(__name__)

#: A pixel belongs to the object where its colour is this far from the background (8-bit steps).
_FOREGROUND = 4 / 255

#: So many views of one instant make a hull that resembles the object.
_MIN_HULL_VIEWS = 4


def views_of(capture: Capture, scale: float = 1.0) -> Views:
    """The moving frames, then the still ones if there are any, at a fraction of the resolution."""
    parts = [v.resized(scale) for v in (capture.moving, capture.still) if v is not None]
    if any(views.alpha is None for views in parts):
        parts = [dataclasses.replace(views, alpha=None) for views in parts]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def find_static_time(clip: OrbitClip) -> float:
    """The timestamp at which the static orbit is frozen, judged by the images.

    Dynamic and static frame i share a camera, so they agree most where the moving object is in its
    static pose. Only the first quarter of the clip is searched, and only a clear win (half the
    squared error of frame 0) counts; otherwise, and without a static orbit, the answer is the first
    timestamp, as the paper has it.
    """
    if clip.static is None or clip.dynamic is None:
        return float(clip.timestamps[0])
    quarter = max(1, clip.num_frames // 4)
    difference = np.asarray(clip.dynamic[:quarter]) - np.asarray(clip.static[:quarter])
    errors = np.mean(difference**2, axis=(1, 2, 3))
    best = int(errors.argmin())
    return float(clip.timestamps[best if errors[best] < 0.5 * errors[0] else 0])


def silhouettes(
    rgb: Float[Any, "t h w 3"], alpha: Float[Any, "t h w"] | None, background: Color
) -> Float[np.ndarray, "t h w"]:
    """The alpha of frames, or 1 where their colour differs from the background."""
    if alpha is not None:
        return np.asarray(alpha, np.float32)
    difference = np.abs(np.asarray(rgb) - np.asarray(background, np.float32)).max(axis=-1)
    return (difference > _FOREGROUND).astype(np.float32)


def first_splats(
    capture: Capture,
    num_splats: int,
    capacity: int,
    sh_degree: int,
    key: jax.Array,
    initializer: Mapping[str, Any] | None = None,
) -> Splats:
    """Splats of the object at rest, as a spec for `gaussians.initialize.build` asks.

    Without one: from the visual hull of the still frames, or of the first instant where at least
    `_MIN_HULL_VIEWS` cameras saw it; else from the part of space that at least three quarters of
    the moving silhouettes agree on; and if nothing is left of either, uniform in a cube.
    """
    rest = _rest_views(capture)
    alpha = silhouettes(rest.rgb, rest.alpha, capture.background)
    capture = dataclasses.replace(capture, still=dataclasses.replace(rest, alpha=alpha))
    options: dict[str, Any] = {"num_splats": num_splats, "capacity": capacity}
    options |= {"sh_degree": sh_degree, "key": key}
    if initializer is not None:
        return initialize.build(initializer)(capture, **options)
    try:
        return initialize.VisualHull()(capture, **options)
    except initialize.EmptyHull as error:
        _LOGGER.warning("%s Starting from a random cube instead.", error)
        return initialize.RandomCube()(capture, **options)


def _rest_views(capture: Capture) -> Views:
    """The frames that show the object at rest best."""
    if capture.still is not None:
        return capture.still
    first = np.asarray(capture.moving.timestamps) == capture.instants[0]
    return capture.moving[first] if first.sum() >= _MIN_HULL_VIEWS else capture.moving


def count_outside(splats: Splats, field: Deformation) -> int:
    """How many splats lie where a field has no features of its own (beyond its `bound`)."""
    bound = getattr(getattr(field, "base", field), "bound", None)
    if bound is None:
        return 0
    outside = np.any(np.abs(np.asarray(splats.means)) > bound, axis=-1)
    return int((outside & np.asarray(splats.active)).sum())
