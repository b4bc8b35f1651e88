"""How I2VGen-XL looks at its reference image: in the noisy latents, and as context tokens.

Zhang et al. 2023 (arXiv 2311.04145); sizes are those of the published network, as VideoMV uses it.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d4d_jax.models.layers import Attention, Dense, convolution
from d4d_jax.typing import AnyArray


class ImageConcat(nn.Module):
    """Latents of the reference clip, encoded by three convolutions and attention over frames.

    VideoMV and VGen add the result twice, by a slip that their weights have learnt to live with;
    here, as in diffusers, it is used once, and the conversion doubles the weights behind it.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, channels = x.shape
        hidden = 4 * channels
        x = nn.silu(convolution(hidden, dtype=self.dtype, name="conv_0")(x))
        x = nn.silu(convolution(hidden, dtype=self.dtype, name="conv_1")(x))
        x = convolution(channels, dtype=self.dtype, name="conv_2")(x)
        x = FrameEncoder(dtype=self.dtype, name="temporal")(x.reshape(b, t, h * w, channels))
        return x.reshape(b, t, h, w, channels)


class FrameEncoder(nn.Module):
    """Attention over frames, then a feed-forward layer without a norm, each added to its input."""

    heads: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t p c"]) -> Float[Array, "b t p c"]:
        channels = x.shape[-1]
        attention = Attention(
            self.heads, channels, "time", "xla", self.dtype, name="attention"
        )  # heads as wide as the input
        x = x + attention(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x))
        return x + FrameMLP(4 * channels, self.dtype, name="feed_forward")(x)


class FrameMLP(nn.Module):
    """Linear, exact gelu, linear."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        hidden = Dense(self.hidden, dtype=self.dtype, name="linear_1")(x)
        hidden = nn.gelu(hidden, approximate=False)
        return Dense(x.shape[-1], dtype=self.dtype, name="linear_2")(hidden)


class ImageTokens(nn.Module):
    """Context tokens from the latent of the reference frame: `grid` / 4 squared of them.

    Attributes:
        grid: cells a side that latents of any size are brought to, by averaging.
    """

    width: int
    grid: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        x = nn.silu(convolution(32, dtype=self.dtype, name="conv_1")(image))
        x = adaptive_average(x, self.grid)
        x = nn.silu(convolution(64, strides=(2, 2), dtype=self.dtype, name="conv_2")(x))
        x = convolution(self.width, strides=(2, 2), dtype=self.dtype, name="conv_3")(x)
        return x.reshape(x.shape[0], -1, self.width)


class ImageEmbedding(nn.Module):
    """Context tokens from the embedding of the reference image by CLIP.

    Attributes:
        hidden: width in between.
        tokens: number of tokens, each as wide as the embedding.
    """

    hidden: int
    tokens: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        width = embedding.shape[-1]
        x = nn.silu(Dense(self.hidden, dtype=self.dtype, name="linear_1")(embedding))
        x = Dense(self.tokens * width, dtype=self.dtype, name="linear_2")(x)
        return x.reshape(-1, self.tokens, width)


def adaptive_average(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """Means over size x size boxes that cover the image and may overlap by a pixel.

    The adaptive average pooling of torch: box i goes from floor(i n / size) to
    ceil((i + 1) n / size). The identity for an image of that size.
    """
    rows, columns = (_boxes(n, size) for n in x.shape[1:3])
    if x.shape[1:3] == (size, size):
        return x
    return jnp.einsum("sh,bhwc,uw->bsuc", rows, x, columns).astype(x.dtype)


def _boxes(length: int, size: int) -> Float[AnyArray, "s n"]:
    starts = np.arange(size) * length // size
    ends = -(-(np.arange(size) + 1) * length // size)
    position = np.arange(length)
    inside = (position >= starts[:, None]) & (position < ends[:, None])
    return jnp.asarray(inside / inside.sum(axis=1, keepdims=True), jnp.float32)
