"""Motion magnitude of an orbital clip: how far the moving object departs from its frozen self.

Diffusion4D Eq. 1 compares every frame of the dynamic orbit with the frame of the static orbit seen
from the same camera. The paper leaves the reduction and the scale open; here both are arguments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d4d_jax.typing import AnyArray

PIXEL_SCALE = 100.0
"""Puts clips of strongly moving objects in the range 5 to 15 that the paper's figures quote."""

_REDUCTIONS = ("mean", "sum")
_SPACES = ("pixel", "latent")


def motion_magnitude(
    dynamic: Float[AnyArray, "*b t h w c"],
    static: Float[AnyArray, "*_b _t _h _w _c"],
    *,
    scale: float | int = PIXEL_SCALE,
    reduction: str = "mean",
) -> Float[AnyArray, "*b"]:
    """Mean over frames of the squared distance between dynamic and static frames (Eq. 1).

    Args:
        dynamic: frames of the moving object in [-1, 1], any leading batch axes.
        static: frames of the object frozen at timestamp 0, same cameras, same range.
        scale: factor on the result. The default 100 makes the network's condition a handy number.
        reduction: "mean" averages the squared difference over pixels and channels, "sum" adds it
            up (the literal norm of Eq. 1). Frames are always averaged.

    Returns:
        One non-negative number per clip, 0 for a clip without motion: a JAX array, or, when both
        clips are numpy arrays, a numpy array that was computed without JAX.

    Raises:
        ValueError: the two clips differ in shape, or the reduction is unknown.
    """
    xp = jnp if any(isinstance(frames, jax.Array) for frames in (dynamic, static)) else np
    dynamic, static = xp.asarray(dynamic), xp.asarray(static)
    if dynamic.shape != static.shape:
        raise ValueError(
            f"dynamic {dynamic.shape} and static {static.shape} frames must have the same shape."
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, not {reduction!r}.")
    squared = xp.square(dynamic.astype(np.float32) - static.astype(np.float32))
    if reduction == "sum":
        return xp.asarray(scale * squared.sum((-3, -2, -1)).mean(-1))
    return xp.asarray(scale * squared.mean((-4, -3, -2, -1)))


def latent_motion_magnitude(
    latents: Float[AnyArray, "*b t h w c"],
    static_latents: Float[AnyArray, "*_b _t _h _w _c"],
    *,
    reduction: str = "mean",
) -> Float[AnyArray, "*b"]:
    """Eq. 1 on latents, without the scale: the m of the motion reconstruction loss (Eq. 2)."""
    return motion_magnitude(latents, static_latents, scale=1.0, reduction=reduction)


@dataclasses.dataclass(frozen=True)
class MotionCondition:
    """Which motion magnitude a network is told; who samples from it asks in the same unit.

    Attributes:
        space: "pixel" (frames in [-1, 1] on white, colours only) or "latent".
        scale: factor on it; 100 for pixels by default, see `PIXEL_SCALE`.
        reduction: as in `motion_magnitude`.

    Raises:
        ValueError: an unknown space or reduction, or a scale that is not positive.
    """

    space: str = "pixel"
    scale: float | int = PIXEL_SCALE
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.space not in _SPACES:
            raise ValueError(f"The space of the motion is one of {_SPACES}, not {self.space!r}.")
        if self.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {_REDUCTIONS}, not {self.reduction!r}.")
        if self.scale <= 0:
            raise ValueError(f"The scale of the motion must be positive, not {self.scale}.")

    def of_batch(
        self,
        batch: Mapping[str, Any],
        latents: Float[Array, "b t h w c"],
        static_latents: Float[Array, "b t h w c"],
    ) -> Float[Array, "b"]:
        """The magnitudes of a batch.

        Args:
            batch: with `motion`, the mean over pixels times 100; for the sum also with `static`
                frames, which tell how many there are.
            latents, static_latents: of its clips.

        Raises:
            ValueError: the sum is asked for and there are no frames.
        """
        if self.space == "latent":
            magnitude = latent_motion_magnitude(latents, static_latents, reduction=self.reduction)
            return jnp.asarray(self.scale * magnitude)
        magnitude = jnp.asarray(batch["motion"]) * (self.scale / PIXEL_SCALE)
        if self.reduction == "mean":
            return magnitude
        if "static" not in batch:
            raise ValueError("The sum over pixels needs frames; cached latents have none.")
        return magnitude * (batch["static"].shape[-3] * batch["static"].shape[-2] * 3)
