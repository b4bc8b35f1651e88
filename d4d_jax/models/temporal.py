"""Layers that look across frames, and the swap family of temporal mixers.

Frame order reaches the network only through the zero-padded temporal convolutions and through the
camera embedding: the attention over frames has no position code and no mask.

A temporal mixer is a Linen module built with `heads`, `head_dim`, `groups` and `dtype` (and, if it
has that field, `attention`) that maps (b t h w c) to the same shape; register your own in the
family "temporal_mixer", or name it as "package.module:Class" in the field `temporal_mixer` of the
network.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d4d_jax.models.layers import Dense, GroupNorm, TransformerBlock, fan_in_uniform, zeros
from d4d_jax.registry import register


class TemporalConv(nn.Module):
    """Four normalised convolutions over three frames, added to the input; zero at the start.

    Attributes:
        dropout: rate in the last three stages.
    """

    dropout: float = 0.0
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], train: bool = False
    ) -> Float[Array, "b t h w c"]:
        norm = {"over_frames": True, "groups": self.groups, "dtype": self.dtype}
        y = x
        for stage in range(4):
            y = nn.silu(GroupNorm(**norm, name=f"norm_{stage}")(y))
            if stage > 0:
                y = nn.Dropout(self.dropout, deterministic=not train)(y)
            kernel_init = zeros if stage == 3 else fan_in_uniform
            y = _FrameConv(kernel_init, self.dtype, name=f"conv_{stage}")(y)
        return x + y


class _FrameConv(nn.Module):
    """Convolution over three frames at every position: a 2-D one on (frames, positions)."""

    kernel_init: nn.initializers.Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        padding = ((1, 1), (0, 0))
        conv = nn.Conv(
            c, (3, 1), padding=padding, dtype=self.dtype, kernel_init=self.kernel_init, name="conv"
        )
        return conv(x.reshape(b, t, h * w, c)).reshape(x.shape)


@register("temporal_mixer", "attention")
class TemporalTransformer(nn.Module):
    """Transformer over the frames at every position: two self-attentions and a feed-forward.

    It never sees the prompt. `heads * head_dim` may differ from the number of channels.
    """

    heads: int
    head_dim: int
    groups: int = 32
    attention: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        y = GroupNorm(1e-6, over_frames=True, groups=self.groups, dtype=self.dtype, name="norm")(x)
        y = y.reshape(b, t, h * w, c)
        y = Dense(self.heads * self.head_dim, dtype=self.dtype, name="proj_in")(y)
        block = TransformerBlock(
            self.heads, self.head_dim, "time", "time", self.attention, self.dtype, name="block"
        )
        y = block(y)
        y = Dense(c, dtype=self.dtype, kernel_init=zeros, name="proj_out")(y)
        return x + y.reshape(x.shape)


@register("temporal_mixer", "convolution")
class ConvolutionMixer(nn.Module):
    """Ablation: a second temporal convolution in the place of the attention over frames."""

    heads: int
    head_dim: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return TemporalConv(groups=self.groups, dtype=self.dtype, name="conv")(x)


@register("temporal_mixer", "none")
class NoMixer(nn.Module):
    """Ablation: no attention over frames."""

    heads: int
    head_dim: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return x
