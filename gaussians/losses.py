"""What a reconstruction is asked to do: match the frames, and be plausible where none looks.

Every loss is a scalar without a weight; `LossWeights` holds the weights, `weighted_sum` applies
them.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d4d_jax.metrics.ssim import ssim
from d4d_jax.typing import AnyArray


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weight of every loss; 0 switches one off, and its computation with it.

    Attributes:
        l1: mean absolute colour error.
        dssim: 1 - SSIM. 3DGS uses 0.8 and 0.2 for these two.
        lpips: perceptual distance; it needs weights that the caller gives.
        alpha: mean absolute error of the silhouette, for frames that carry alpha.
        depth: edge-aware depth smoothness.
        plane_tv, time_smoothness, time_l1: regularisers of the HexPlane field.
        lifespan: distance of the opacity curves from where they started.
        arap, acceleration: regularisers of the control points' motion.
    """

    l1: float = 0.8
    dssim: float = 0.2
    lpips: float = 0.0
    alpha: float = 0.3
    depth: float = 0.0
    plane_tv: float = 1e-4
    time_smoothness: float = 1e-2
    time_l1: float = 1e-4
    lifespan: float = 1e-4
    arap: float = 3.0
    acceleration: float = 15.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"The weight of the loss {field.name!r} is negative: {value}.")


def l1(image: Float[Array, "h w c"], target: Float[AnyArray, "h w c"]) -> Float[Array, ""]:
    """Mean absolute difference."""
    return jnp.mean(jnp.abs(image - target))


def dssim(image: Float[Array, "h w 3"], target: Float[AnyArray, "h w 3"]) -> Float[Array, ""]:
    """1 - SSIM of two images in [0, 1]: Gaussian window of sigma 1.5, mean over channels."""
    return 1 - ssim(image, target)


def alpha_l1(alpha: Float[Array, "h w"], target: Float[AnyArray, "h w"]) -> Float[Array, ""]:
    """Mean absolute difference of the accumulated opacity and the frame's alpha."""
    return jnp.mean(jnp.abs(alpha - target))


def depth_smoothness(
    depth: Float[Array, "h w"],
    alpha: Float[Array, "h w"],
    image: Float[AnyArray, "h w 3"],
    *,
    edge_sharpness: float = 10.0,
    min_alpha: float = 0.5,
) -> Float[Array, ""]:
    """Edge-aware smoothness of the expected depth: |dD| exp(-sharpness |dI|), both directions.

    The rasterizer returns the accumulated depth (sum of a T z); what is smoothed is that divided by
    the accumulated alpha. Neighbours count where both have at least `min_alpha`, so a silhouette
    against the background costs nothing. Gradients reach the splats through depth and alpha.

    Args:
        depth: accumulated depth, in world units.
        alpha: accumulated opacity, in [0, 1].
        image: the frame, in [0, 1]: depth may jump where its colour does.
        edge_sharpness: per unit of mean absolute colour difference.
        min_alpha: in (0, 1].

    Returns:
        The sum over counted neighbour pairs divided by the number of pixels, in world units.
    """
    solid = jax.lax.stop_gradient(alpha) >= min_alpha
    expected = depth / jnp.where(solid, alpha, 1.0)
    total = jnp.zeros(())
    for axis in (0, 1):
        edge = jnp.mean(jnp.abs(jnp.diff(jnp.asarray(image), axis=axis)), axis=-1)
        pairs = _pairs(solid, axis)
        step = jnp.abs(jnp.diff(expected, axis=axis))
        total += jnp.sum(jnp.where(pairs, step * jnp.exp(-edge_sharpness * edge), 0))
    return total / depth.size


def weighted_sum(losses: Mapping[str, Float[Array, ""]], weights: LossWeights) -> Float[Array, ""]:
    """The sum of the losses, each times the weight of its name.

    Raises:
        ValueError: a loss has no weight of its name.
    """
    unknown = sorted(set(losses) - {field.name for field in dataclasses.fields(weights)})
    if unknown:
        raise ValueError(f"LossWeights has no weight for the losses {unknown}.")
    return sum((getattr(weights, name) * loss for name, loss in losses.items()), jnp.zeros(()))


def _pairs(mask: Array, axis: int) -> Array:
    size = mask.shape[axis]
    first = jax.lax.slice_in_dim(mask, 0, size - 1, axis=axis)
    return first & jax.lax.slice_in_dim(mask, 1, size, axis=axis)
