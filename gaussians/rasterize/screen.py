"""What every rasterizer implementation receives and returns.

An implementation is a function of the type `CompositeFn`: it blends n splats that are already
projected, coloured and masked. What comes before (projection, spherical harmonics) and after
(background) is in `gaussians.rasterize`.
"""

from typing import NamedTuple, Protocol

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
