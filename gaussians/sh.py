"""Real spherical harmonics of degree 0 to 3, with the constants and signs of 3D Gaussian Splatting.

The basis is the one of Kerbl et al. 2023 (its renderer's `computeColorFromSH`): within a degree the
order runs over m = -l .. l, and the Condon-Shortley signs are kept, so degree 1 reads
(-C1 y, C1 z, -C1 x). Coefficients in published .ply files therefore need no change of sign.
"""

import math

import jax.numpy as jnp
from jaxtyping import Float

from d4d_jax.typing import AnyArray

MAX_DEGREE = 3
C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_C3 = (
    0.5900435899266435,
    2.890611442640554,
    0.4570457994644658,
    0.3731763325901154,
    1.445305721320277,
)


def degree_of(num_coefficients: int) -> int:
    """The degree that has this many coefficients: (degree + 1)^2.

    Raises:
        ValueError: When the number is not 1, 4, 9 or 16.
    """
    degree = math.isqrt(max(num_coefficients, 0)) - 1
    if not 0 <= degree <= MAX_DEGREE or (degree + 1) ** 2 != num_coefficients:
        raise ValueError(
            f"{num_coefficients} spherical-harmonic coefficients belong to no degree from 0 to "
            f"{MAX_DEGREE}; use 1, 4, 9 or 16."
        )
    return degree


def basis(directions: Float[AnyArray, "*b 3"], degree: int) -> Float[AnyArray, "*b k"]:
    """The (degree + 1)^2 basis functions at unit directions.

    Raises:
        ValueError: When the degree is outside 0..3.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"Spherical-harmonic degree {degree} is outside 0..{MAX_DEGREE}.")
    x, y, z = directions[..., 0], directions[..., 1], directions[..., 2]
    terms = [jnp.full_like(x, C0)]
    if degree >= 1:
        terms += [-_C1 * y, _C1 * z, -_C1 * x]
    xx, yy, zz = x * x, y * y, z * z
    if degree >= 2:
        terms += [
            _C2[0] * x * y,
            -_C2[0] * y * z,
            _C2[1] * (2.0 * zz - xx - yy),
            -_C2[0] * x * z,
            _C2[2] * (xx - yy),
        ]
    if degree >= 3:
        around = 4.0 * zz - xx - yy
        terms += [
            -_C3[0] * y * (3.0 * xx - yy),
            _C3[1] * x * y * z,
            -_C3[2] * y * around,
            _C3[3] * z * (2.0 * zz - 3.0 * xx - 3.0 * yy),
            -_C3[2] * x * around,
            _C3[4] * z * (xx - yy),
            -_C3[0] * x * (xx - 3.0 * yy),
        ]
    return jnp.stack(terms, axis=-1)


def to_rgb(
    coefficients: Float[AnyArray, "*b k 3"],
    directions: Float[AnyArray, "*b 3"],
    degree: int | None = None,
) -> Float[AnyArray, "*b 3"]:
    """Colour seen along `directions`: max(0, sum of coefficients * basis + 0.5).

    Args:
        coefficients: Degree-major, at least (degree + 1)^2 of them.
        directions: From the camera to the splat in world axes, unit length.
        degree: Degree to evaluate, default all that is there. Training raises it step by step.

    Returns:
        RGB, 0 or above (not clipped at 1); no gradient where it was cut off at 0.

    Raises:
        ValueError: When the coefficients do not reach the degree.
    """
    available = degree_of(coefficients.shape[-2])
    degree = available if degree is None else degree
    if degree > available:
        raise ValueError(
            f"Degree {degree} was asked for, but the coefficients reach only degree {available}."
        )
    values = basis(directions, degree)
    used = coefficients[..., : values.shape[-1], :]
    colour = jnp.sum(used * values[..., None], axis=-2) + 0.5
    return jnp.where(colour > 0.0, colour, 0.0)


def from_rgb(rgb: Float[AnyArray, "*b 3"]) -> Float[AnyArray, "*b 3"]:
    """The degree-0 coefficients of a colour in [0, 1] that is the same from every side."""
    return (rgb - 0.5) / C0
