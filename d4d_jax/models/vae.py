"""Latent codecs: images in [-1, 1] to latents and back.

A codec is a small static object with `encode(params, images)` and `decode(params, latents)`
(`d4d_jax.typing.Codec`); its `params` are a pytree of arrays.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d4d_jax.registry import register
from d4d_jax.typing import AnyArray


@register("codec", "patch_pca")
@dataclasses.dataclass(frozen=True)
class PatchPCA:
    """A fixed linear codec: square patches on their principal components.

    Every patch of `factor` x `factor` pixels becomes one latent cell. `fit_patch_pca` makes the
    parameters: "mean" (p,) and "basis" (p, dim) of flattened patches (rows, columns, channels),
    basis columns orthonormal, and "scale" (dim,), what a latent of 1 stands for.

    Attributes:
        factor: side of a patch in pixels.
        dim: latent channels.
        whitening: how far `fit` evens out the channels' variances (see `fit_patch_pca`).
    """

    factor: int = 4
    dim: int = 16
    whitening: float = 1.0

    def fit(self, images: Float[np.ndarray, "*b h w c"]) -> dict[str, Float[np.ndarray, "..."]]:
        """Parameters fitted to images in [-1, 1]: `fit_patch_pca` with this codec's fields."""
        return fit_patch_pca(images, self.factor, self.dim, whitening=self.whitening)

    def encode(
        self, params: dict[str, AnyArray], images: Float[AnyArray, "*b h w c"]
    ) -> Float[Array, "*b h2 w2 d"]:
        """Latents of images in [-1, 1].

        Raises:
            ValueError: height or width is no multiple of `factor`, or the codec was fitted to
                another number of channels.
        """
        patches = _to_patches(jnp.asarray(images, jnp.float32), self.factor)
        if patches.shape[-1] != params["mean"].shape[0]:
            raise ValueError(
                f"The codec was fitted to {params['mean'].shape[0] // self.factor**2} channels;"
                f" the images have {images.shape[-1]}."
            )
        centred = jnp.asarray(patches - params["mean"])
        return centred @ jnp.asarray(params["basis"] / params["scale"])

    def decode(
        self, params: dict[str, AnyArray], latents: Float[AnyArray, "*b h w d"]
    ) -> Float[Array, "*b h2 w2 c"]:
        """Images near [-1, 1] (not clipped); the exact inverse on the span of the components."""
        basis = jnp.asarray(params["basis"] * params["scale"])
        patches = jnp.asarray(latents, jnp.float32) @ basis.T + params["mean"]
        *batch, h, w, p = patches.shape
        f = self.factor
        grid = jnp.swapaxes(patches.reshape(*batch, h, w, f, f, p // f**2), -3, -4)
        return grid.reshape(*batch, h * f, w * f, p // f**2)


@register("codec", "identity")
@dataclasses.dataclass(frozen=True)
class Identity:
    """Pixel space: the latents are the images."""

    def encode(self, params: object, images: Float[AnyArray, "*s"]) -> Float[Array, "*s"]:
        """The images as they are; `params` is not looked at."""
        return jnp.asarray(images)

    def decode(self, params: object, latents: Float[AnyArray, "*s"]) -> Float[Array, "*s"]:
        """The latents as they are."""
        return jnp.asarray(latents)


def fit_patch_pca(
    images: Float[np.ndarray, "*b h w c"],
    factor: int = 4,
    dim: int = 16,
    *,
    whitening: float = 1.0,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Parameters of `PatchPCA(factor)` with `dim` latent channels, fitted to images in [-1, 1].

    Args:
        images: any number of images, at least `dim` patches in all.
        factor: side of a patch in pixels.
        dim: latent channels, at most factor * factor * c.
        whitening: 1 gives every latent channel unit variance; 0 keeps the channels' relative
            variances (the strongest component dominates) and makes their mean 1; between the two,
            the standard deviation of component i goes as its own to the power 1 - whitening.

    Raises:
        ValueError: sizes that do not fit.
    """
    patches = _to_patches(np.asarray(images, np.float64), factor)
    patches = patches.reshape(-1, patches.shape[-1])
    if not 1 <= dim <= min(patches.shape):
        raise ValueError(
            f"dim must lie between 1 and {min(patches.shape)} for {patches.shape[0]} patches of"
            f" {patches.shape[1]} numbers, not {dim}."
        )
    mean = patches.mean(0)
    covariance = np.cov(patches - mean, rowvar=False, bias=True)
    variance, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    variance, basis = variance[::-1][:dim], vectors[:, ::-1][:, :dim]
    basis = basis * np.where(basis.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    deviation = np.sqrt(np.maximum(variance, 1e-8))
    scale = deviation**whitening
    scale = scale * np.sqrt(np.mean((deviation / scale) ** 2))
    tables = {"mean": mean, "basis": basis, "scale": scale}
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _to_patches(images: AnyArray, factor: int) -> AnyArray:
    """(... h w c) to (... h/factor w/factor factor*factor*c)."""
    *batch, h, w, c = images.shape
    if h % factor or w % factor:
        raise ValueError(f"Images of {h} x {w} do not split into patches of {factor} x {factor}.")
    grid = images.reshape(*batch, h // factor, factor, w // factor, factor, c).swapaxes(-3, -4)
    return grid.reshape(*batch, h // factor, w // factor, factor * factor * c)
