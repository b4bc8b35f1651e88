"""The oracle: every splat against every pixel, nearest first, one after the other.

This is the blending rule of 3D Gaussian Splatting written down (Kerbl et al. 2023, with the exact
elliptical support instead of its square). Gradients are JAX's own. The time grows with splats times
pixels: it is for tests and small scenes, and in float64 (`jax.enable_x64`) it is what the other
implementations are measured against.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from gaussians.rasterize.screen import ALPHA_MIN, TRANSMITTANCE_MIN, Composite, ScreenSplats


def composite(
    screen: ScreenSplats,
    *,
    width: int,
    height: int,
    tile_size: int | None = None,
    capacity: int | None = None,
    alpha_max: float = 0.99,
) -> Composite:
    """Blends splats into an image. Without tiles or lists, two arguments mean nothing here."""
    del tile_size, capacity
    dtype = screen.means2d.dtype
    image = (height, width)
    x = jnp.broadcast_to(jnp.arange(width, dtype=dtype) + 0.5, image)
    y = jnp.broadcast_to(jnp.arange(height, dtype=dtype)[:, None] + 0.5, image)
    order = jnp.argsort(jnp.where(screen.visible, screen.depths, jnp.inf), stable=True)
    n = order.shape[0]
    chunk = max(1, math.isqrt(n))

    def blend(carry: tuple, splat: ScreenSplats) -> tuple:
        transmittance, features, alpha_sum = carry
        dx, dy = x - splat.means2d[0], y - splat.means2d[1]
        if splat.absolute is not None:
            dx = _watched(dx, splat.absolute[0])
            dy = _watched(dy, splat.absolute[1])
        across = dx + splat.factors[1] * dy
        distance = splat.factors[0] * across**2 + splat.factors[2] * dy**2
        peaked = splat.opacities * jnp.exp(-0.5 * distance)
        alpha = jnp.where(peaked > alpha_max, alpha_max, peaked)  # no gradient where it is cut
        alpha = jnp.where(splat.visible & (alpha >= ALPHA_MIN), alpha, 0.0)
        remaining = transmittance * (1.0 - alpha)
        weight = jnp.where(remaining >= TRANSMITTANCE_MIN, transmittance * alpha, 0.0)
        # `remaining` never grows again, so a pixel that stopped once stays stopped.
        return (remaining, features + weight[..., None] * splat.features, alpha_sum + weight), None

    def blend_chunk(carry: tuple, index: Array) -> tuple:
        splats = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, n - 1)], screen)
        return lax.scan(blend, carry, splats._replace(visible=splats.visible & (index < n)))

    carry = (
        jnp.ones(image, dtype),
        jnp.zeros((*image, screen.features.shape[-1]), dtype),
        jnp.zeros(image, dtype),
    )
    if n:
        # Chunks that are computed again in the backward pass: memory for 2 sqrt(n) images, not n.
        chunks = jnp.pad(order, (0, -n % chunk), constant_values=n).reshape(-1, chunk)
        carry, _ = lax.scan(jax.checkpoint(blend_chunk), carry, chunks)
    _, features, alpha = carry
    return Composite(features, alpha, jnp.zeros((), jnp.int32))


@jax.custom_vjp
def _watched(offset: Float[Array, "h w"], absolute: Float[Array, ""]) -> Float[Array, "h w"]:
    """`offset`; the gradient that comes back through it is summed without signs in `absolute`."""
    del absolute
    return offset


_watched.defvjp(
    lambda offset, absolute: (offset, None),
    lambda _, cotangent: (cotangent, jnp.sum(jnp.abs(cotangent))),
)
