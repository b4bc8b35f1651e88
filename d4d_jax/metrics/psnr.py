"""Peak signal-to-noise ratio."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from d4d_jax.typing import AnyArray


def psnr(
    image: Float[AnyArray, "*b h w c"],
    reference: Float[AnyArray, "*b h w c"],
    *,
    data_range: float = 1.0,
) -> Float[Array, "*b"]:
    """10 log10(data_range^2 / mean squared error) of every image, in dB; inf where they are equal.

    The figure of a video is commonly the mean of these per-frame values, not the PSNR of the mean
    squared error.

    Args:
        image: values in [0, data_range]; nothing is clipped.
        reference: of the same shape.
        data_range: difference between white and black.
    """
    error = jnp.mean(jnp.square(jnp.asarray(image) - jnp.asarray(reference)), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(data_range**2 / error)
