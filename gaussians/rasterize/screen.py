"""What every rasterizer implementation receives and returns.

An implementation is a function of the type `CompositeFn`: it blends n splats that are already
projected, coloured and masked. What comes before (projection, spherical harmonics) and after
(background) is in `gaussians.rasterize`.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

#: A splat reaches exactly the pixels where its alpha is at least this.
ALPHA_MIN = 1.0 / 255.0
#: A pixel takes no splat that would bring its transmittance below this, and none behind that one.
TRANSMITTANCE_MIN = 1e-4


class ScreenSplats(NamedTuple):
    """n splats on the image plane.

    means2d: Centres in pixels, pixel (row 0, column 0) having its centre at (0.5, 0.5).
    factors: LDL^T factors (p, s, r) of the inverse covariance: at an offset (dx, dy) px from the
        centre the squared Mahalanobis distance is p (dx + s dy)^2 + r dy^2, with p, r > 0. The
        entries themselves, p, p s and p s^2 + r, would cancel to noise along a needle in float32.
    opacities: Peak alpha in [0, 1].
    features: What is blended: colour, depth, ...
    depths: Sorting key, nearest first; equal depths keep their order. Carries no gradient.
    extents: Half width and half height in px of the ellipse alpha >= ALPHA_MIN. No gradient.
    visible: False for splats that must not be drawn; their numbers are finite stand-ins.
    absolute: Zeros that change nothing; their gradient is sum_p |d loss / d centre| over the pixels
        p, component by component: the `means2d` gradient without cancellation. None: not wanted.
    """

    means2d: Float[Array, "n 2"]
    factors: Float[Array, "n 3"]
    opacities: Float[Array, "n"]
    features: Float[Array, "n f"]
    depths: Float[Array, "n"]
    extents: Float[Array, "n 2"]
    visible: Bool[Array, "n"]
    absolute: Float[Array, "n 2"] | None = None


class Composite(NamedTuple):
    """Blended features sum_k a_k T_k f_k, alpha sum_k a_k T_k, and the pairs that did not fit."""

    features: Float[Array, "h w f"]
    alpha: Float[Array, "h w"]
    overflow: Int[Array, ""]


class CompositeFn(Protocol):
    """The signature that all implementations share.

    `tile_size` and `capacity` are hints; None, or an implementation without tiles or without a list
    of fixed size, takes its own. A `tile_size` that it cannot take raises ValueError.
    """

    def __call__(
        self,
        screen: ScreenSplats,
        *,
        width: int,
        height: int,
        tile_size: int | None,
        capacity: int | None,
        alpha_max: float,
    ) -> Composite: ...


def geometry_gradients(
    geometry: Iterable[Float[Array, "*k"]], moments: Iterable[Float[Array, "*k"]]
) -> Float[Array, "*k 6"]:
    """Cotangent of (x, y, p, s, r, opacity) from the moments of e = a dL/da over pixels.

    Args:
        geometry: x, y, p, s, r and opacity of the splats, x and y in pixels from any origin.
        moments: sum_p e_p {1, x_p, y_p, x_p^2, x_p y_p, y_p^2} over pixels p, from the same origin;
            the tile's centre loses the fewest digits.
    """
    x, y, p, s, r, opacity = geometry
    m, mx, my, mxx, mxy, myy = moments
    # Moments of u = dx + s dy and of dy; c is x + s y of the splat's centre.
    c = x + s * y
    mu, muy, muu = mx + s * my, mxy + s * myy, mxx + s * (2.0 * mxy + s * myy)
    u, dy = mu - c * m, my - y * m
    uu = muu - c * (2.0 * mu - c * m)
    udy = muy - c * my - y * u
    dyy = myy - y * (2.0 * my - y * m)
    of_opacity = m / jnp.maximum(opacity, ALPHA_MIN)
    gradients = (p * u, p * s * u + r * dy, -0.5 * uu, -p * udy, -0.5 * dyy, of_opacity)
    return jnp.stack(gradients, axis=-1)
