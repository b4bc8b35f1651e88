"""Agreement of silhouettes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from d4d_jax.typing import AnyArray


def alpha_iou(
    alpha: Float[AnyArray, "*b h w"],
    reference: Float[AnyArray, "*b h w"],
    *,
    threshold: float = 0.5,
) -> Float[Array, "*b"]:
    """Intersection over union of the pixels above `threshold`, of every image, in [0, 1].

    Two empty silhouettes agree: 1.
    """
    inside, wanted = jnp.asarray(alpha) > threshold, jnp.asarray(reference) > threshold
    intersection = jnp.sum(inside & wanted, axis=(-2, -1))
    union = jnp.sum(inside | wanted, axis=(-2, -1))
    return jnp.where(union > 0, intersection / jnp.maximum(union, 1), 1.0)
