"""What a reconstruction is made from: frames of a moving object by known cameras.

A `Capture` holds the views to fit and, apart from them, views to judge the result by. It comes from
an orbital clip (`of_clip`) or from other layouts (`gaussians.datasets`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from d4d_jax import pytree
from d4d_jax.cameras import Camera
from d4d_jax.clips import WHITE, Color, OrbitClip, resize
from d4d_jax.typing import Alpha, AnyArray, Frames


@pytree.dataclass
class Views:
    """Frames with their cameras and instants, leading axis v.

    Attributes:
        rgb: (v, h, w, 3) in [0, 1].
        alpha: (v, h, w) in [0, 1], or None when unknown.
        camera: of every frame.
        timestamps: (v,) in [0, 1].
    """

    rgb: Frames
    alpha: Alpha | None
    camera: Camera
    timestamps: AnyArray

    def __len__(self) -> int:
        """The number of frames."""
        return self.rgb.shape[0]

    def __getitem__(self, index: slice | Int[AnyArray, "_"] | Bool[AnyArray, "_"]) -> "Views":
        """Some of the frames."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def resized(self, scale: float) -> "Views":
        """The same frames at a multiple of the resolution (area averaging when it is below 1)."""
        if scale == 1:
            return self
        width, height = (round(n * scale) for n in (self.camera.width, self.camera.height))
        rgb, alpha = np.asarray(self.rgb), self.alpha
        if alpha is not None:
            alpha = resize(np.asarray(alpha)[..., None], width, height)[..., 0]
        camera = self.camera.resized(width, height)
        return dataclasses.replace(self, rgb=resize(rgb, width, height), alpha=alpha, camera=camera)


@dataclasses.dataclass(frozen=True)
class Capture:
    """Frames to fit, and frames to judge by.

    Attributes:
        moving: frames of the moving object; several may share an instant. Numpy arrays.
        still: frames of the object at rest, all at the timestamp of that pose; None without any,
            `moving` itself where nothing moves.
        held_out: named sets of frames that are never fitted.
        background: the colour the frames are composited on, in [0, 1].
        centre: of the world that the files speak of; it is the origin here.
        scale: length here of one unit there.
        seconds: that the timestamps 0 to 1 last, or None when the files do not tell.
    """

    moving: Views
    still: Views | None = None
    held_out: Mapping[str, Views] = dataclasses.field(default_factory=dict)
    background: Color = WHITE
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    seconds: float | None = None

    @property
    def instants(self) -> Float[np.ndarray, "t"]:
        """The different timestamps of the moving frames, in their order."""
        return np.unique(np.asarray(self.moving.timestamps))

    @property
    def sets(self) -> dict[str, Views]:
        """All frames by name: "dynamic", "static" where there are still ones, the held-out sets."""
        fitted = {"dynamic": self.moving}
        if self.still is not None and self.still is not self.moving:
            fitted["static"] = self.still
        return fitted | dict(self.held_out)


def of_clip(clip: OrbitClip, static_time: float) -> Capture:
    """The orbits of a clip to fit, and its front frames held out.

    Args:
        clip: with a dynamic orbit.
        static_time: timestamp of the static orbit, in [0, 1].

    Raises:
        ValueError: the clip has no dynamic orbit.
    """
    if clip.dynamic is None:
        raise ValueError("The clip has no dynamic orbit (multi_frame0.png, ...) to reconstruct.")
    camera = jax.tree.map(np.asarray, clip.camera)
    times = np.asarray(clip.timestamps, np.float32)
    front = jax.tree.map(lambda leaf: np.repeat(leaf[:1], len(times), axis=0), camera)
    still, held_out = None, {}
    if clip.static is not None:
        at_rest = np.full_like(times, static_time)
        still = Views(clip.static, clip.static_alpha, camera, at_rest)
    if clip.front is not None:
        held_out["front"] = Views(clip.front, clip.front_alpha, front, times)
    moving = Views(clip.dynamic, clip.dynamic_alpha, camera, times)
    return Capture(moving, still, held_out, clip.background)
