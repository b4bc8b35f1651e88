"""The autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752), and its codec.

Frames of h x w pixels become latents of h/8 x w/8 cells with 4 channels. Names, order of the blocks
and every epsilon are those of CompVis' `AutoencoderKL`, whose weights VideoMV keeps frozen::

    codec = KLCodec(tile=64)                            # frames in fours, tiles of 512 pixels
    latents = codec.encode(params, 2 * frames - 1)      # (24, 32, 32, 4) of (24, 256, 256, 3)
    latents = codec.encode(params, 2 * frames - 1, key=key)  # a sample instead of the mean
    frames = (codec.decode(params, latents) + 1) / 2
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from d4d_jax.models.attention import attend
from d4d_jax.models.layers import Dense, GroupNorm, Upsample, convolution, fan_in_uniform
from d4d_jax.models.tiling import blend_tiles
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray, PyTree

EPSILON = 1e-6  # of every normalisation


class Posterior(NamedTuple):
    """Mean and log variance of the latents, before they are scaled."""

    mean: Float[Array, "*b h w z"]
    logvar: Float[Array, "*b h w z"]

    def draw(self, key: Key[Array, ""] | None) -> Float[Array, "*b h w z"]:
        """A sample, or the mean without a key."""
        if key is None:
            return self.mean
        noise = jax.random.normal(key, self.mean.shape)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def to_posterior(moments: Float[Array, "*b h w d"]) -> Posterior:
    """Splits mean and log variance; the latter is clipped to [-30, 20]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


class AutoencoderKL(nn.Module):
    """Convolutional autoencoder with a Gaussian posterior.

    Attributes:
        width: channels of the finest level.
        multipliers: channels of each level in units of `width`; each level but the last halves the
            resolution.
        blocks: residual blocks of a level of the encoder; the decoder has one more.
        latent_channels: channels of the latents.
        image_channels: channels of the images.
        groups: channel groups of every normalisation.
        scale: latents are the posterior's times this, which gives them unit variance.
        dtype: what the encoder computes in. The decoder always computes in float32: its
            activations are large and every rounding is seen.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    scale: float = 0.18215
    dtype: DTypeLike = jnp.float32

    def setup(self):
        channels = tuple(self.width * m for m in self.multipliers)
        z, groups = self.latent_channels, self.groups
        self.encoder = Encoder(channels, self.blocks, 2 * z, groups, self.dtype)
        self.quant = Dense(2 * z, dtype=jnp.float32)
        self.post_quant = Dense(z, dtype=jnp.float32)
        self.decoder = Decoder(channels, self.blocks + 1, self.image_channels, groups)

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.multipliers) - 1)

    def __call__(
        self, images: Float[AnyArray, "*b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "*b h w c"]:
        """The images encoded and decoded."""
        return self.decode(self.encode(images, key))

    def encode(
        self, images: Float[AnyArray, "*b h w c"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "*b h2 w2 z"]:
        """Scaled latents of images in [-1, 1]: the posterior mean, or with a key a sample."""
        return self.scale * self.posterior(images).draw(key)

    def posterior(self, images: Float[AnyArray, "*b h w c"]) -> Posterior:
        """Distribution of the unscaled latents of images in [-1, 1]."""
        return to_posterior(self.moments(images))

    def moments(self, images: Float[AnyArray, "*b h w c"]) -> Float[Array, "*b h2 w2 d"]:
        """What the encoder puts out: mean and log variance, on one axis and not clipped.

        Raises:
            ValueError: the images have another number of channels, or sides that are no multiples
                of `factor`.
        """
        *batch, h, w, c = images.shape
        if c != self.image_channels:
            raise ValueError(
                f"The autoencoder takes {self.image_channels} channels; the images have {c}."
            )
        if h % self.factor or w % self.factor:
            raise ValueError(
                f"Images of {h} x {w} do not split into latent cells of {self.factor} x"
                f" {self.factor} pixels; pad or resize them."
            )
        x = jnp.asarray(images, jnp.float32).reshape(1, -1, h, w, c)
        x = self.quant(self.encoder(x))
        return x.reshape(*batch, h // self.factor, w // self.factor, x.shape[-1])

    def decode(self, latents: Float[AnyArray, "*b h w z"]) -> Float[Array, "*b h2 w2 c"]:
        """Images near [-1, 1] (not clipped) of scaled latents, in float32.

        Raises:
            ValueError: the latents have another number of channels.
        """
        *batch, h, w, z = latents.shape
        if z != self.latent_channels:
            raise ValueError(f"The decoder takes {self.latent_channels} channels, not {z}.")
        x = jnp.asarray(latents, jnp.float32).reshape(1, -1, h, w, z)
        x = self.decoder(self.post_quant(x / self.scale))
        return x.reshape(*batch, h * self.factor, w * self.factor, self.image_channels)


class Encoder(nn.Module):
    """Images to the moments of the latents; the finest level first."""

    channels: tuple[int, ...]
    blocks: int
    out_channels: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 z"]:
        norm = {"groups": self.groups, "dtype": self.dtype}
        x = convolution(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(self.channels):
            down = i < len(self.channels) - 1
            x = Level(width, self.blocks, "down" if down else None, **norm, name=f"down_{i}")(x)
        x = Middle(**norm, name="mid")(x)
        x = nn.silu(GroupNorm(EPSILON, **norm, name="norm_out")(x))
        x = convolution(self.out_channels, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module):
    """Latents to images in float32; the coarsest level first, `up_0` is the finest."""

    channels: tuple[int, ...]
    blocks: int
    out_channels: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w z"]) -> Float[Array, "b t h2 w2 c"]:
        x = convolution(self.channels[-1], name="conv_in")(x)
        x = Middle(self.groups, name="mid")(x)
        for i, width in reversed(list(enumerate(self.channels))):
            up = "up" if i > 0 else None
            x = Level(width, self.blocks, up, self.groups, name=f"up_{i}")(x)
        x = nn.silu(GroupNorm(EPSILON, groups=self.groups, name="norm_out")(x))
        return convolution(self.out_channels, name="conv_out")(x)


class Level(nn.Module):
    """Residual blocks of one resolution, then a resampler ("down", "up" or None)."""

    channels: int
    blocks: int
    resample: str | None
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 d"]:
        for j in range(self.blocks):
            x = Residual(self.channels, self.groups, self.dtype, name=f"residual_{j}")(x)
        if self.resample is not None:
            resampler = {"down": PadDownsample, "up": Upsample}[self.resample]
            x = resampler(dtype=self.dtype, name=self.resample)(x)
        return x


class Middle(nn.Module):
    """Residual block, attention over the positions of a frame, residual block."""

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        sizes = (self.groups, self.dtype)
        x = Residual(x.shape[-1], *sizes, name="residual_0")(x)
        x = FrameAttention(*sizes, name="attention")(x)
        return Residual(x.shape[-1], *sizes, name="residual_1")(x)


class Residual(nn.Module):
    """Two normalised 3x3 convolutions; a 1x1 one carries the input over when channels change."""

    channels: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        norm = {"groups": self.groups, "dtype": self.dtype}
        h = nn.silu(GroupNorm(EPSILON, **norm, name="norm_in")(x))
        h = convolution(self.channels, dtype=self.dtype, name="conv_in")(h)
        h = nn.silu(GroupNorm(EPSILON, **norm, name="norm_out")(h))
        h = convolution(self.channels, dtype=self.dtype, name="conv_out")(h)
        if x.shape[-1] != self.channels:
            x = Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Single-head attention over the positions of a frame."""

    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        y = GroupNorm(EPSILON, groups=self.groups, dtype=self.dtype, name="norm")(x)
        query, key, value = (
            Dense(c, dtype=self.dtype, name=name)(y).reshape(b * t, h * w, 1, c)
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value)
        return x + Dense(c, dtype=self.dtype, name="out")(y.reshape(x.shape))


class PadDownsample(nn.Module):
    """3x3 convolution of stride 2, padded by one pixel at the bottom and on the right only."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
        options = {"strides": (2, 2), "padding": ((0, 1), (0, 1)), "kernel_init": fan_in_uniform}
        return nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="conv", **options)(x)


#: Named sets of fields: `AutoencoderKL(**VARIANTS["tiny"])`. "sd" has 83,653,863 parameters.
VARIANTS: dict[str, dict[str, Any]] = {
    "sd": {},
    "tiny": {"width": 16, "multipliers": (1, 2, 2, 2), "blocks": 1, "groups": 8},
}


@register("codec", "kl")
@dataclasses.dataclass(frozen=True)
class KLCodec:
    """`AutoencoderKL` as a codec: any number of leading axes, in bounded memory.

    `params` are the parameters of `network`. Images have 3 channels, or 4 as in this project's
    data: colours on white, then alpha, all in [-1, 1]. The fourth is used to move the colours onto
    `background` and is not encoded, so that decoded images have 3 channels.

    Tiles overlap and are blended linearly. A tile has normalisation statistics and attention of its
    own, and zero padding at its borders, so the result differs slightly from that of the whole
    frame; with frames no larger than a tile it is the same. Gradients take the memory of one chunk
    or tile, too: activations are computed again on the way back.

    Attributes:
        variant: name in `VARIANTS`.
        scale: factor of the latents, 0.18215 for Stable Diffusion 1 and 2.
        chunk: frames that are in memory at a time; 0 takes them all at once.
        tile: side of a tile in latent cells; 0 takes frames whole.
        overlap: least overlap of neighbouring tiles in latent cells.
        background: grey level in [0, 1] behind images with alpha; 1 is white.
        dtype: name of what the encoder computes in.

    Raises:
        ValueError: an unknown variant, a negative size, or a tile that its overlap fills.
    """

    variant: str = "sd"
    scale: float = 0.18215
    chunk: int = 4
    tile: int = 0
    overlap: int = 16
    background: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"Unknown autoencoder {self.variant!r}; known: {', '.join(VARIANTS)}.")
        if min(self.chunk, self.tile) < 0:
            raise ValueError(
                f"chunk and tile are 0 or more, not {self.chunk} and {self.tile}; 0 means all."
            )
        if self.tile and not 0 <= self.overlap < self.tile:
            raise ValueError(
                f"Tiles of {self.tile} latent cells cannot overlap by {self.overlap}; the overlap"
                " must be 0 or more and below the tile."
            )

    @property
    def network(self) -> AutoencoderKL:
        """The autoencoder."""
        return AutoencoderKL(**VARIANTS[self.variant], scale=self.scale, dtype=self.dtype)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random parameters, to train from or for their shapes (`jax.eval_shape`)."""
        side = self.network.factor
        return self.network.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def encode(
        self,
        params: PyTree,
        images: Float[AnyArray, "*b h w c"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*b h2 w2 z"]:
        """Latents of images in [-1, 1]: the posterior mean, or with a key a sample.

        The sample does not depend on `chunk`.

        Raises:
            ValueError: no parameters, neither 3 nor 4 channels, or sides that are no multiples
                of 8.
        """
        images = jnp.asarray(images, jnp.float32)
        if images.shape[-1] == 4:
            uncovered = 1 - images[..., 3:]  # 2 (1 - alpha)
            images = images[..., :3] + uncovered * (self.background - 1)
        cells = (self.network.factor, 1)
        moments = self._run("moments", params, images, cells)
        return self.scale * to_posterior(moments).draw(key)

    def decode(
        self, params: PyTree, latents: Float[AnyArray, "*b h w z"]
    ) -> Float[Array, "*b h2 w2 3"]:
        """Images near [-1, 1] (not clipped), in float32.

        Raises:
            ValueError: no parameters, or another number of channels.
        """
        cells = (1, self.network.factor)
        return self._run("decode", params, jnp.asarray(latents, jnp.float32), cells)

    def _run(self, method: str, params: PyTree, x: Array, cells: tuple[int, int]) -> Array:
        """A method of the network, in chunks of frames and in tiles."""
        if not params:
            raise ValueError(
                f"The codec 'kl' has no parameters of its own: pass those of the {self.variant!r}"
                " autoencoder, for example converted ones, or KLCodec.init(key)."
            )
        run = functools.partial(self.network.apply, {"params": params}, method=method)
        run = jax.checkpoint(run)
        if self.tile and max(x.shape[-3:-1]) > self.tile * cells[0]:
            tiles = {"tile": self.tile, "overlap": self.overlap, "cells": cells}
            run = functools.partial(blend_tiles, run, **tiles)
        frames = x.reshape(-1, *x.shape[-3:])
        chunk = self.chunk or len(frames)
        whole = len(frames) - len(frames) % chunk
        parts = []
        if whole == chunk:
            parts.append(run(frames[:whole]))
        elif whole:
            mapped = jax.lax.map(run, frames[:whole].reshape(-1, chunk, *frames.shape[1:]))
            parts.append(mapped.reshape(whole, *mapped.shape[2:]))
        if whole < len(frames):
            parts.append(run(frames[whole:]))
        joined = jnp.concatenate(parts)
        return joined.reshape(*x.shape[:-3], *joined.shape[1:])
