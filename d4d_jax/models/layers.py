"""Per-frame layers of the spatio-temporal UNet.

Activations are (b t h w c): clips, frames, height, width, channels. Parameters are float32;
`dtype` is what the layers compute in, and normalisation statistics and softmax stay in float32.
The layout of the blocks and every epsilon follow ModelScope's text-to-video UNet, the ancestor of
VideoMV's networks.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d4d_jax.models.attention import attend

#: Uniform in +-1/sqrt(fan_in), the default of the reference implementation.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
zeros = nn.initializers.zeros_init()


class GroupNorm(nn.Module):
    """Group normalisation with statistics per frame, or over all frames of a clip.

    Attributes:
        epsilon: added to the variance.
        over_frames: whether the statistics of a clip are shared by its frames.
        groups: number of channel groups, at most; a layer with fewer channels uses one per channel.
    """

    epsilon: float = 1e-5
    over_frames: bool = False
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        channels = x.shape[-1]
        groups = min(self.groups, channels)
        if channels % groups:
            raise ValueError(
                f"{channels} channels do not split into {groups} normalisation groups."
            )
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", zeros, (channels,), jnp.float32)
        axes = (1, 2, 3) if self.over_frames else (2, 3)
        x = x.astype(jnp.float32)
        # Moments per channel in one pass over the activations, then per group on a tiny array.
        mean = _spread(x.mean(axes, keepdims=True), groups)
        square = _spread(jnp.square(x).mean(axes, keepdims=True), groups)
        gain = scale * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.epsilon)
        return (x * gain + (bias - mean * gain)).astype(self.dtype)


def _spread(x: Array, groups: int) -> Array:
    """Mean over each channel group, repeated for every channel of the group."""
    grouped = x.reshape(*x.shape[:-1], groups, -1).mean(-1, keepdims=True)
    return jnp.repeat(grouped, x.shape[-1] // groups, -1).reshape(x.shape)


class Dense(nn.Module):
    """Linear layer on the last axis, run as one plain matrix product.

    XLA's CPU backend takes two to three times as long for the weight gradient of a product with
    several leading axes, so these are folded first.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = fan_in_uniform
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with the time embedding added in between; zero at the start.

    Attributes:
        channels: output channels; a 1x1 convolution carries the input over when they change.
        dropout: rate before the last convolution.
    """

    channels: int
    dropout: float = 0.0
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        embedding: Float[Array, "b t e"],
        train: bool = False,
    ) -> Float[Array, "b t h w d"]:
        norm = {"groups": self.groups, "dtype": self.dtype}
        h = nn.silu(GroupNorm(**norm, name="norm_in")(x))
        h = convolution(self.channels, dtype=self.dtype, name="conv_in")(h)
        shift = Dense(self.channels, dtype=self.dtype, name="embedding")(nn.silu(embedding))
        h = h + shift[:, :, None, None]
        h = nn.silu(GroupNorm(**norm, name="norm_out")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = convolution(self.channels, dtype=self.dtype, kernel_init=zeros, name="conv_out")(h)
        if x.shape[-1] != self.channels:
            x = Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Multi-head attention; output width equals input width.

    Attributes:
        over: what a token looks at: the tokens of its own frame ("space"), those at its position in
            all frames ("time"), or tokens shared by the clip ("context").
        implementation: see `d4d_jax.models.attention.attend`.
    """

    heads: int
    head_dim: int
    over: str
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t p c"], context: Float[Array, "b q e"] | None = None
    ) -> Float[Array, "b t p c"]:
        if (context is None) == (self.over == "context"):
            raise ValueError(f"Attention over {self.over!r} and context {context} do not match.")
        b, t, p, channels = x.shape
        inner = self.heads * self.head_dim
        sequences = {"space": b * t, "time": b * p, "context": b}[self.over]

        def project(name: str, tokens: Array) -> Array:
            tokens = Dense(inner, use_bias=False, dtype=self.dtype, name=name)(tokens)
            if self.over == "time":
                tokens = tokens.swapaxes(1, 2)
            return tokens.reshape(sequences, -1, self.heads, self.head_dim)

        source = x if context is None else context
        query, key, value = project("query", x), project("key", source), project("value", source)
        mixed = attend(query, key, value, self.implementation)
        if self.over == "time":
            mixed = mixed.reshape(b, p, t, inner).swapaxes(1, 2)
        return Dense(channels, dtype=self.dtype, name="out")(mixed.reshape(b, t, p, inner))


class FeedForward(nn.Module):
    """GEGLU: a linear layer gated by the exact (erf) gelu of another, then a linear layer."""

    expansion: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        channels = x.shape[-1]
        hidden = Dense(2 * self.expansion * channels, dtype=self.dtype, name="gated")(x)
        return Dense(channels, dtype=self.dtype, name="out")(_gated(hidden))


@jax.checkpoint
def _gated(hidden: Array) -> Array:
    """One half times gelu of the other; nothing but the argument is kept for the backward pass.

    `jax.nn.gelu` has erfc in it, which takes longer on a CPU.
    """
    value, gate = jnp.split(hidden, 2, axis=-1)
    gate = gate.astype(jnp.float32)
    gelu = 0.5 * gate * (1.0 + jax.lax.erf(gate * math.sqrt(0.5)))
    return value * gelu.astype(value.dtype)


class TransformerBlock(nn.Module):
    """Attention, second attention, feed-forward; each pre-normalised and added to its input.

    Attributes:
        first: what the first attention looks at.
        second: what the second looks at, or None to leave it out.
        attention: implementation of both, see `d4d_jax.models.attention.attend`.
    """

    heads: int
    head_dim: int
    first: str
    second: str | None
    attention: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t p c"], context: Float[Array, "b q e"] | None = None
    ) -> Float[Array, "b t p c"]:
        def norm(name: str):
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        sizes = {"heads": self.heads, "head_dim": self.head_dim, "dtype": self.dtype}
        sizes |= {"implementation": self.attention}
        x = x + Attention(**sizes, over=self.first, name="attention_1")(norm("norm_1")(x))
        if self.second is not None:
            tokens = context if self.second == "context" else None
            second = Attention(**sizes, over=self.second, name="attention_2")
            x = x + second(norm("norm_2")(x), tokens)
        return x + FeedForward(dtype=self.dtype, name="feed_forward")(norm("norm_3")(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of one frame, with cross-attention to the context tokens.

    Without context tokens the cross-attention is left out.
    """

    heads: int
    head_dim: int
    groups: int = 32
    attention: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], context: Float[Array, "b q e"] | None = None
    ) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        y = GroupNorm(1e-6, groups=self.groups, dtype=self.dtype, name="norm")(x)
        y = y.reshape(b, t, h * w, c)
        y = Dense(self.heads * self.head_dim, dtype=self.dtype, name="proj_in")(y)
        second = None if context is None else "context"
        block = TransformerBlock(
            self.heads, self.head_dim, "space", second, self.attention, self.dtype, name="block"
        )
        y = block(y, context)
        y = Dense(c, dtype=self.dtype, kernel_init=zeros, name="proj_out")(y)
        return x + y.reshape(x.shape)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded by one pixel on every side."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
        return convolution(x.shape[-1], strides=(2, 2), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
        b, t, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, :, None, :, None], (b, t, h, 2, w, 2, c))
        x = x.reshape(b, t, 2 * h, 2 * w, c)
        return convolution(c, dtype=self.dtype, name="conv")(x)


def convolution(features: int, **options) -> nn.Conv:
    """3x3 convolution, padded by one pixel on every side."""
    options.setdefault("kernel_init", fan_in_uniform)
    return nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), **options)
