"""Structural similarity (Wang et al. 2004), in the two forms in use."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from d4d_jax.typing import AnyArray

_SIGMA = 1.5
_RADIUS = 5  # 3.5 standard deviations, where scikit-image and the 2004 paper cut the window
_UNIFORM_SIZE = 7


def ssim(
    image: Float[AnyArray, "*b h w c"],
    reference: Float[AnyArray, "*b h w c"],
    *,
    window: Literal["gaussian", "uniform"] = "gaussian",
    data_range: float = 1.0,
) -> Float[Array, "*b"]:
    """Mean structural similarity of every image, at most 1; differentiable.

    Local moments are taken per channel at the positions where the whole window lies inside the
    image, and the similarity is averaged over positions and channels. Two windows are offered:

    - "gaussian": 11 x 11, standard deviation 1.5, the form of the paper and of the D-SSIM loss of
      Gaussian splatting; scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
      use_sample_covariance=False, data_range=1, channel_axis=-1)`.
    - "uniform": 7 x 7 with sample covariances, scikit-image's default.

    Args:
        image: values in [0, data_range].
        reference: of the same shape.
        data_range: difference between white and black.

    Raises:
        ValueError: the images are smaller than the window, or the window is unknown.
    """
    weights, covariance_scale = _window(window)
    height, width = image.shape[-3:-1]
    if min(height, width) < len(weights):
        raise ValueError(
            f"SSIM with the {window} window needs images of at least {len(weights)} pixels a side;"
            f" got {height} x {width}."
        )
    # Second moments lose digits when the mean is far from zero, and do not depend on it otherwise.
    image, reference = jnp.moveaxis(image, -1, -3), jnp.moveaxis(reference, -1, -3)
    offset = lax.stop_gradient(jnp.mean(reference, axis=(-2, -1), keepdims=True))
    x, y = image - offset, reference - offset
    mean_x, mean_y = _smooth(x, weights), _smooth(y, weights)
    variance_x = covariance_scale * (_smooth(x * x, weights) - mean_x**2)
    variance_y = covariance_scale * (_smooth(y * y, weights) - mean_y**2)
    covariance = covariance_scale * (_smooth(x * y, weights) - mean_x * mean_y)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = mean_x + offset, mean_y + offset
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(brightness * structure, axis=(-3, -2, -1))


def _window(name: str) -> tuple[Float[np.ndarray, "k"], float]:
    """The one-dimensional window, and the factor from its weighted to the wanted covariance."""
    if name == "gaussian":
        weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
        return weights / weights.sum(), 1.0
    if name == "uniform":
        count = _UNIFORM_SIZE**2
        return np.full(_UNIFORM_SIZE, 1 / _UNIFORM_SIZE), count / (count - 1)
    raise ValueError(f"Unknown SSIM window {name!r}; use 'gaussian' or 'uniform'.")


def _smooth(
    images: Float[Array, "*b h w"], weights: Float[np.ndarray, "k"]
) -> Float[Array, "*b height width"]:
    """Correlates rows and columns with `weights`, where these fit in.

    Written as two products with banded matrices: on a CPU several times faster, forward and
    backward, than a convolution or a sum of shifted images.
    """
    rows, columns = _band(weights, images.shape[-2]), _band(weights, images.shape[-1])
    down = jnp.matmul(rows, images, precision=lax.Precision.HIGHEST)
    return jnp.matmul(down, columns.T, precision=lax.Precision.HIGHEST)


def _band(weights: Float[np.ndarray, "k"], size: int) -> Float[np.ndarray, "output size"]:
    """Row i holds the weights at columns i, i + 1, ..."""
    matrix = np.zeros((size - len(weights) + 1, size), np.float32)
    for shift, weight in enumerate(weights):
        np.fill_diagonal(matrix[:, shift:], weight)
    return matrix
