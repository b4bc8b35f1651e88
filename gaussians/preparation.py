"""What a reconstruction derives from a clip before its first step: views, and first splats."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from d4d_jax.clips import OrbitClip
from d4d_jax.typing import PyTree
from gaussians import initialize
from gaussians.deformation.lifespan import Lifespan
from gaussians.optimization import Views
from gaussians.types import Splats

#: A pixel belongs to the object where its colour is this far from the background (8-bit steps).
_FOREGROUND = 4 / 255


def views_of(clip: OrbitClip, static_time: float, scale: float = 1.0) -> Views:
    """The dynamic frames, then the static ones if there are any, at a fraction of the resolution.

    Static frames get the timestamp `static_time`. The front frames are left out: they are held out
    for evaluation.
    """
    if scale != 1:
        clip = clip.resized(round(clip.camera.width * scale), round(clip.camera.height * scale))
    rgb, alpha = [clip.dynamic], [clip.dynamic_alpha]
    times = [np.asarray(clip.timestamps, np.float32)]
    cameras = [clip.camera]
    if clip.static is not None:
        rgb, alpha = [*rgb, clip.static], [*alpha, clip.static_alpha]
        times.append(np.full(len(clip.camera), static_time, np.float32))
        cameras.append(clip.camera)
    has_alpha = all(masks is not None for masks in alpha)
    return Views(
        rgb=jnp.concatenate([jnp.asarray(frames) for frames in rgb]),
        alpha=jnp.concatenate([jnp.asarray(masks) for masks in alpha]) if has_alpha else None,
        camera=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *cameras),
        timestamps=jnp.concatenate(times),
    )


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
    rgb: Float[Any, "t h w 3"], alpha: Float[Any, "t h w"] | None, clip: OrbitClip
) -> Float[np.ndarray, "t h w"]:
    """The alpha of frames, or 1 where their colour differs from the background."""
    if alpha is not None:
        return np.asarray(alpha, np.float32)
    difference = np.abs(np.asarray(rgb) - np.asarray(clip.background, np.float32)).max(axis=-1)
    return (difference > _FOREGROUND).astype(np.float32)


def first_splats(
    clip: OrbitClip, num_splats: int, capacity: int, sh_degree: int, key: jax.Array
) -> Splats:
    """Splats of the static pose.

    From the visual hull of the static orbit; without one, from the part of space that at least
    three quarters of the dynamic silhouettes agree on; and if nothing is left of either, uniform in
    a cube.
    """
    frames, alpha, tolerance = clip.static, clip.static_alpha, 0
    if frames is None:
        frames, alpha, tolerance = clip.dynamic, clip.dynamic_alpha, clip.num_frames // 4
    options: dict[str, Any] = {"capacity": capacity, "sh_degree": sh_degree, "key": key}
    try:
        return initialize.visual_hull(
            np.asarray(frames),
            silhouettes(frames, alpha, clip),
            clip.camera,
            num_splats=num_splats,
            tolerance=tolerance,
            **options,
        )
    except ValueError:
        return initialize.random_cube(num_splats, **options)


def pose_windows(clip: OrbitClip, num_windows: int) -> list[tuple[int, int, float]]:
    """Cuts the clip into windows and says how far the object is from its static pose in each.

    Returns:
        (first frame, last frame, mismatch) per window; the mismatch is the mean over the frames of
        1 - IoU of the dynamic and the static silhouette. Empty without a static orbit.
    """
    if clip.static is None or clip.dynamic is None or num_windows < 1:
        return []
    moving = silhouettes(clip.dynamic, clip.dynamic_alpha, clip) > 0.5
    still = silhouettes(clip.static, clip.static_alpha, clip) > 0.5
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
    opacity: float = 0.6,
) -> tuple[Splats, PyTree]:
    """Adds splats that live in one window of frames only, where the object left its static pose.

    They lie on the hull of the window's own silhouettes (one may miss a point, since the object
    moves). The budget is shared out in proportion to the mismatch of the windows; windows below
    `min_mismatch`, or whose silhouettes agree on nothing, get none.
    """
    windows = [w for w in pose_windows(clip, num_windows) if w[2] >= min_mismatch]
    total = sum(mismatch for _, _, mismatch in windows)
    masks = silhouettes(clip.dynamic, clip.dynamic_alpha, clip)
    for number, (first, last, mismatch) in enumerate(windows):
        count = math.floor(budget * mismatch / total)
        chosen = slice(first, last + 1)
        try:
            born = initialize.visual_hull(
                np.asarray(clip.dynamic[chosen]),
                masks[chosen],
                clip.camera[chosen],
                num_splats=count,
                tolerance=1,
                sh_degree=splats.sh_degree,
                opacity=opacity,
                key=jax.random.fold_in(key, number),
            )
        except ValueError:
            continue
        splats, members = _append(splats, born)
        start, stop = float(clip.timestamps[first]), float(clip.timestamps[last])
        params = field.with_window(params, members, start, stop)
    return splats, params


def _append(splats: Splats, born: Splats) -> tuple[Splats, Bool[jax.Array, "n"]]:
    """Puts `born` into free slots; returns the splats and which slots are new."""
    free = np.flatnonzero(~np.asarray(splats.active))[: len(born)]
    merged = jax.tree.map(
        lambda old, new: jnp.asarray(old).at[free].set(new[: len(free)]), splats, born
    )
    members = jnp.zeros(len(splats), bool).at[free].set(True)
    return merged, members
