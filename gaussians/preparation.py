"""What a reconstruction derives from its frames before the first step: views, first splats."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from d4d_jax.cameras import Camera
from d4d_jax.clips import Color, OrbitClip
from d4d_jax.typing import PyTree
from gaussians import initialize
from gaussians.captures import Capture, Views
from gaussians.deformation import Deformation
from gaussians.deformation.lifespan import Lifespan
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
    capture: Capture, num_splats: int, capacity: int, sh_degree: int, key: jax.Array
) -> Splats:
    """Splats of the object at rest.

    From the visual hull of the still frames, or of the first instant where at least
    `_MIN_HULL_VIEWS` cameras saw it; else from the part of space that at least three quarters of
    the moving silhouettes agree on; and if nothing is left of either, uniform in a cube.
    """
    views, tolerance = _hull_views(capture)
    options: dict[str, Any] = {"capacity": capacity, "sh_degree": sh_degree, "key": key}
    try:
        return initialize.visual_hull(
            np.asarray(views.rgb),
            silhouettes(views.rgb, views.alpha, capture.background),
            views.camera,
            num_splats=num_splats,
            tolerance=tolerance,
            resolution=_hull_resolution(views.camera),
            **options,
        )
    except initialize.EmptyHull as error:
        _LOGGER.warning("%s Starting from a random cube instead.", error)
        return initialize.random_cube(num_splats, **options)


def _hull_views(capture: Capture) -> tuple[Views, int]:
    """The frames to carve the first hull from, and how many of them may miss a point."""
    if capture.still is not None:
        return capture.still, 0
    first = np.asarray(capture.moving.timestamps) == capture.instants[0]
    if first.sum() >= _MIN_HULL_VIEWS:
        return capture.moving[first], 0
    return capture.moving, len(capture.moving) // 4


def count_outside(splats: Splats, field: Deformation) -> int:
    """How many splats lie where a field has no features of its own (beyond its `bound`)."""
    bound = getattr(getattr(field, "base", field), "bound", None)
    if bound is None:
        return 0
    outside = np.any(np.abs(np.asarray(splats.means)) > bound, axis=-1)
    return int((outside & np.asarray(splats.active)).sum())


def pose_windows(clip: OrbitClip, num_windows: int) -> list[tuple[int, int, float]]:
    """Cuts the clip into windows and says how far the object is from its static pose in each.

    Returns:
        (first frame, last frame, mismatch) per window; the mismatch is the mean over the frames of
        1 - IoU of the dynamic and the static silhouette. Empty without a static orbit.
    """
    if clip.static is None or clip.dynamic is None or num_windows < 1:
        return []
    moving = silhouettes(clip.dynamic, clip.dynamic_alpha, clip.background) > 0.5
    still = silhouettes(clip.static, clip.static_alpha, clip.background) > 0.5
    common = (moving & still).sum(axis=(1, 2))
    mismatch = 1 - common / np.maximum((moving | still).sum(axis=(1, 2)), 1)
    chunks = np.array_split(np.arange(clip.num_frames), num_windows)
    return [(int(c[0]), int(c[-1]), float(mismatch[c].mean())) for c in chunks if len(c) > 1]


def add_window_splats(
    clip: OrbitClip,
    splats: Splats,
    field: Lifespan,
    params: PyTree,
    *,
    budget: int,
    num_windows: int,
    key: jax.Array,
    min_mismatch: float = 0.15,
    min_coverage: float = 0.985,
    opacity: float = 0.6,
) -> tuple[Splats, PyTree]:
    """Adds splats that live in one window of frames only, where the object left its static pose.

    They lie on the hull of the window's own silhouettes. That is a body only if the object hardly
    moves within the window, so windows whose hull leaves parts of the silhouettes uncovered get
    none, as do those that differ from the static silhouettes by less than `min_mismatch`. The
    budget is shared out in proportion to the mismatch. Splats of the static pose that more than one
    silhouette of such a window says the object has left are gone during that window.

    Args:
        clip: with dynamic and static frames; without them nothing is added.
        splats: with free slots.
        field: gives the new splats their lifespan.
        params: of the field.
        budget: most splats to add.
        num_windows: equal windows that the clip is cut into.
        key: places the splats.
        min_mismatch: 1 - IoU.
        min_coverage: fraction of the silhouettes, mean over the window.
        opacity: of the new splats, in (0, 1).
    """
    bodies = []
    for first, last, mismatch in pose_windows(clip, num_windows):
        if mismatch >= min_mismatch:
            hull = functools.partial(
                _window_hull, clip, slice(first, last + 1), splats.sh_degree, opacity, key
            )
            probe = hull(num_splats=4000, tolerance=0)
            if probe is not None and _coverage(probe, clip, first, last) >= min_coverage:
                bodies.append((first, last, mismatch, hull))
    still = splats
    total = sum(mismatch for _, _, mismatch, _ in bodies)
    for first, last, mismatch, hull in bodies:
        # One silhouette may miss a point: the object does move a little.
        born = hull(num_splats=math.floor(budget * mismatch / total), tolerance=1)
        if born is not None:
            splats, members = _append(splats, born)
            times = float(clip.timestamps[first]), float(clip.timestamps[last])
            params = field.with_window(params, members, *times)
            params = field.without_window(params, _left_behind(still, clip, first, last), *times)
    return splats, params


def _window_hull(
    clip: OrbitClip,
    window: slice,
    sh_degree: int,
    opacity: float,
    key: jax.Array,
    *,
    num_splats: int,
    tolerance: int,
) -> Splats | None:
    """Splats on the hull of a window of the dynamic orbit; None where the silhouettes disagree."""
    frames = np.asarray(clip.dynamic)
    masks = silhouettes(frames, clip.dynamic_alpha, clip.background)
    try:
        return initialize.visual_hull(
            frames[window],
            masks[window],
            clip.camera[window],
            num_splats=num_splats,
            tolerance=tolerance,
            resolution=_hull_resolution(clip.camera),
            sh_degree=sh_degree,
            opacity=opacity,
            key=jax.random.fold_in(key, window.start),
        )
    except initialize.EmptyHull:
        return None


def _left_behind(splats: Splats, clip: OrbitClip, first: int, last: int) -> Bool[jax.Array, "n"]:
    """Which splats lie outside of more than one silhouette of some dynamic frames."""
    masks = silhouettes(clip.dynamic, clip.dynamic_alpha, clip.background)[first : last + 1] > 0.5
    camera = jax.tree.map(np.asarray, clip.camera[first : last + 1])
    inside = initialize.carve(np.asarray(splats.means, np.float32), masks, camera, tolerance=1)
    return jnp.asarray(splats.active) & ~jnp.asarray(inside)


def _hull_resolution(camera: Camera) -> int:
    """Voxels along the object: about one per pixel of a frame it fills, within reason."""
    return min(144, max(24, camera.width))


def _coverage(body: Splats, clip: OrbitClip, first: int, last: int, cells: int = 16) -> float:
    """The fraction of the silhouettes of some dynamic frames that a body's splats fall on.

    Judged on a grid of `cells` x `cells` over the image; mean over the frames.
    """
    masks = silhouettes(clip.dynamic, clip.dynamic_alpha, clip.background)
    points, size = np.asarray(body.means), np.array([clip.camera.width, clip.camera.height])
    covered = []
    for i in range(first, last + 1):
        pose, intrinsics = clip.camera[i].world_to_camera, clip.camera[i].intrinsics
        pixels = (points @ pose[:3, :3].T + pose[:3, 3]) @ np.asarray(intrinsics).T
        cell = np.clip(pixels[:, :2] / pixels[:, 2:] / size * cells, 0, cells - 1).astype(int)
        hit = np.zeros((cells, cells), bool)
        hit[cell[:, 1], cell[:, 0]] = True
        rows, columns = ((np.arange(cells) + 0.5) / cells * n for n in masks.shape[1:])
        inside = masks[i][np.ix_(rows.astype(int), columns.astype(int))] > 0.5
        covered.append((hit & inside).sum() / max(inside.sum(), 1))
    return float(np.mean(covered))


def _append(splats: Splats, born: Splats) -> tuple[Splats, Bool[jax.Array, "n"]]:
    """Puts `born` into free slots; returns the splats and which slots are new."""
    free = np.flatnonzero(~np.asarray(splats.active))[: len(born)]
    merged = jax.tree.map(
        lambda old, new: jnp.asarray(old).at[free].set(new[: len(free)]), splats, born
    )
    members = jnp.zeros(len(splats), bool).at[free].set(True)
    return merged, members
