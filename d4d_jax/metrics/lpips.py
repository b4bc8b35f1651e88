"""LPIPS: distance of images by the features of a classification network (Zhang et al. 2018).

The features of every stage are normalised to unit length over the channels; their squared
differences, weighted per channel by the heads that were fitted to human judgements, are averaged
over the image and summed over the stages. That is version 0.1 of the PyPI package `lpips`. With
the backbones and heads of `stlpips_pytorch` the same formula gives the shift-tolerant variant
(Ghildyal & Liu 2022). `d4d_jax.metrics.perceptual_weights` reads the published weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d4d_jax import pytree
from d4d_jax.metrics.backbones import smallest_size, stage_features, stages_of
from d4d_jax.typing import AnyArray

# Mean and standard deviation of ImageNet, rounded as in the package, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@pytree.dataclass
class Lpips:
    """The distance with its weights, to call.

    A pytree whose arrays are traced: compile `jax.jit(Lpips.__call__)(model, image, reference)`, or
    pass it to the function that you compile; closed over, the weights would be constants in it.

    Attributes:
        backbone: "vgg", "alex", "squeeze", "vgg_shift_tolerant" or "alex_shift_tolerant".
        weights: parameters of the backbone by torchvision's names, kernels (h, w, in, out).
        heads: weights of the features of every stage, (c,) each.
    """

    backbone: str = pytree.static()
    weights: dict[str, AnyArray]
    heads: tuple[AnyArray, ...]

    def __post_init__(self):
        stages_of(self.backbone)

    def __call__(
        self, image: Float[AnyArray, "*b h w 3"], reference: Float[AnyArray, "*b h w 3"]
    ) -> Float[Array, "*b"]:
        """Distance of every image from its reference: 0 where they are equal; differentiable.

        Symmetric in its arguments. All images of a batch are in memory at once, with all their
        features; `jax.lax.map` over the batch avoids it.

        Args:
            image: values in [0, 1]; nothing is clipped.
            reference: of the same shape.

        Raises:
            ValueError: the images are too small for the backbone.
        """
        return sum(
            (jnp.mean(stage, axis=(-2, -1)) for stage in self._differences(image, reference)),
            jnp.zeros(image.shape[:-3]),
        )

    def spatial(
        self, image: Float[AnyArray, "*b h w 3"], reference: Float[AnyArray, "*b h w 3"]
    ) -> Float[Array, "*b h w"]:
        """Where the distance comes from: the sum over stages, interpolated to the image's pixels.

        The package's `spatial=True`; same arguments and errors as the distance itself. The mean
        over the pixels is close to the distance, but not equal to it.
        """
        shape = image.shape[:-1]
        return sum(
            (
                jax.image.resize(stage, shape, "linear", antialias=False)
                for stage in self._differences(image, reference)
            ),
            jnp.zeros(shape),
        )

    def _differences(self, image: AnyArray, reference: AnyArray) -> list[Array]:
        """Weighted squared differences of every stage, (*b height width)."""
        pairs = zip(self._unit_features(image), self._unit_features(reference), strict=True)
        return [
            jnp.sum(jnp.square(a - b) * jnp.asarray(head), axis=-1)
            for (a, b), head in zip(pairs, self.heads, strict=True)
        ]

    def _unit_features(self, images: AnyArray) -> list[Array]:
        """Features of every stage, of length 1 over the channels, (*b height width c)."""
        height, width = images.shape[-3:-1]
        smallest = smallest_size(self.backbone)
        if min(height, width) < smallest:
            raise ValueError(
                f"LPIPS with the backbone {self.backbone!r} needs images of at least {smallest}"
                f" pixels a side; got {height} x {width}."
            )
        batch = jnp.asarray(images, jnp.float32).reshape(-1, height, width, 3)
        batch = (2 * batch - 1 - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        features = stage_features(self.backbone, self.weights, batch)
        return [_unit(f).reshape(*images.shape[:-3], *f.shape[1:]) for f in features]


def _unit(features: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Scaled to length 1; 0 stays 0, with the gradient 0 behind a ReLU, not NaN."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features / (jnp.sqrt(jnp.maximum(squares, 1e-20)) + 1e-10)
