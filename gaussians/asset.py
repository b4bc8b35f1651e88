"""The result of a reconstruction: splats, the field that moves them, and how they came about."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from d4d_jax.cameras import Camera
from d4d_jax.clips import WHITE, Color
from d4d_jax.typing import PyTree
from gaussians.deformation import Deformation, Timestamp
from gaussians.rasterize import Render, rasterize
from gaussians.types import Splats


@dataclasses.dataclass(frozen=True)
class Asset:
    """A moving object as Gaussians.

    Attributes:
        splats: at rest (canonical).
        deformation: the field, static.
        params: its parameters.
        background: the colour the reconstruction was fitted on, in [0, 1].
        meta: facts about the run that can be written as JSON.
    """

    splats: Splats
    deformation: Deformation
    params: PyTree
    background: Color = WHITE
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def at(self, t: Timestamp) -> Splats:
        """The splats at timestamp t in [0, 1].

        Raises:
            ValueError: t is a number outside [0, 1].
        """
        if isinstance(t, (int, float)) and not 0 <= t <= 1:
            raise ValueError(f"Timestamps lie in [0, 1]; got {t}.")
        return _moved(self.splats, self.params, jnp.asarray(t, jnp.float32), self.deformation)

    def render(
        self,
        camera: Camera,
        t: Timestamp,
        *,
        background: Color | None = None,
        implementation: str | None = None,
    ) -> Render:
        """The image of one camera (no leading axes) at one timestamp, on the host's schedule.

        The rasterizer's pair capacity is doubled until the view fits.
        """
        colour = jnp.asarray(self.background if background is None else background, jnp.float32)
        return draw(self.at(t), camera, colour, implementation=implementation)

    def render_video(
        self, camera: Camera, timestamps: Float[np.ndarray, "t"], **options: Any
    ) -> Float[np.ndarray, "t h w 3"]:
        """Frame i is camera i at timestamp i, in [0, 1]. Options as in `render`."""
        pairs = zip(range(len(camera)), timestamps, strict=True)
        frames = [self.render(camera[i], float(t), **options).rgb for i, t in pairs]
        return np.clip(np.stack([np.asarray(frame) for frame in frames]), 0, 1)


def draw(
    splats: Splats,
    camera: Camera,
    background: Float[jax.Array, "3"],
    *,
    implementation: str | None = None,
) -> Render:
    """Rasterizes one view, enlarging the rasterizer's pair list until nothing overflows."""
    pairs = pair_capacity(8 * len(splats))
    while True:
        render = _draw(splats, camera, background, implementation, pairs)
        if not int(render.overflow):
            return render
        pairs = pair_capacity(pairs + int(render.overflow))


def pair_capacity(wanted: float | int) -> int:
    """The least power of two that holds `wanted` pairs: few sizes, so few compilations."""
    return 2 ** max(8, math.ceil(math.log2(max(wanted, 1))))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _draw(
    splats: Splats,
    camera: Camera,
    background: Float[jax.Array, "3"],
    implementation: str | None,
    pairs: int,
) -> Render:
    return rasterize(splats, camera, background, implementation=implementation, capacity=pairs)


@functools.partial(jax.jit, static_argnames=("deformation",))
def _moved(
    splats: Splats, params: PyTree, t: Float[jax.Array, ""], deformation: Deformation
) -> Splats:
    return deformation.apply(params, splats, t)
