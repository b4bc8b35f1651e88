"""The oracle: every splat against every pixel, nearest first, one after the other.

This is the blending rule of 3D Gaussian Splatting written down (Kerbl et al. 2023, with the exact
elliptical support instead of its square). Gradients are JAX's own. The time grows with splats times
pixels, and under differentiation so does the memory: it is for tests and small scenes, and in
float64 (`jax.enable_x64`) it is what the other implementations are measured against.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gaussians.rasterize.screen import ALPHA_MIN, TRANSMITTANCE_MIN, Composite, ScreenSplats


def composite(
    screen: ScreenSplats,
    *,
    width: int,
    height: int,
    capacity: int | None = None,
    alpha_max: float = 0.99,
) -> Composite:
    """Blends splats into an image; `capacity` means nothing here, and nothing overflows."""
    del capacity
    dtype = screen.means2d.dtype
    x = jnp.arange(width, dtype=dtype)[None, :] + 0.5
    y = jnp.arange(height, dtype=dtype)[:, None] + 0.5
    order = jnp.argsort(jnp.where(screen.visible, screen.depths, jnp.inf), stable=True)
    sorted_screen = jax.tree.map(lambda leaf: leaf[order], screen)

    def blend(carry, splat: ScreenSplats):
        transmittance, features, alpha_sum = carry
        dx, dy = x - splat.means2d[0], y - splat.means2d[1]
        xx, xy, yy = splat.conics[0], splat.conics[1], splat.conics[2]
        peaked = splat.opacities * jnp.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
        alpha = jnp.where(peaked > alpha_max, alpha_max, peaked)  # no gradient where it is cut
        alpha = jnp.where(splat.visible & (alpha >= ALPHA_MIN), alpha, 0.0)
        remaining = transmittance * (1.0 - alpha)
        weight = jnp.where(remaining >= TRANSMITTANCE_MIN, transmittance * alpha, 0.0)
        # `remaining` never grows again, so a pixel that stopped once stays stopped.
        return (remaining, features + weight[..., None] * splat.features, alpha_sum + weight), None

    image = (height, width)
    start = (
        jnp.ones(image, dtype),
        jnp.zeros((*image, screen.features.shape[-1]), dtype),
        jnp.zeros(image, dtype),
    )
    (_, features, alpha), _ = lax.scan(blend, start, sorted_screen)
    return Composite(features, alpha, jnp.zeros((), jnp.int32))
