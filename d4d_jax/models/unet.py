"""The spatio-temporal UNet of Diffusion4D.

Block structure and order are those of ModelScope's text-to-video UNet as VideoMV uses it (a camera
MLP next to the time embedding), plus Diffusion4D's motion MLP. The defaults are the paper-scale
text network; `VARIANTS` holds named sets of fields.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.embeddings import EmbeddingMLP, ImageTokens, MotionEmbedding, sinusoidal
from d4d_jax.models.layers import (
    Downsample,
    GroupNorm,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    convolution,
    zeros,
)
from d4d_jax.models.temporal import TemporalConv
from d4d_jax.registry import lookup, register
from d4d_jax.typing import AnyArray

IMAGE_CONCATS = ("none", "first", "all")


@register("network", "unet")
class SpatioTemporalUNet(nn.Module):
    """Predicts noise, velocity or the clean latents of an orbital clip.

    `model.apply({"params": params}, x_t, timestep, conditioning)` is a DenoiseFn once `params` are
    bound, for example by `functools.partial(model.apply, {"params": params})`.

    Attributes:
        in_channels: channels of the noisy latents.
        out_channels: channels of the prediction.
        width: channels of the first level; the time embedding is four times as wide.
        multipliers: channels of each level in units of `width`; each level halves the resolution.
        blocks: residual blocks of a level on the way down; there is one more on the way up.
        attention_levels: levels with transformers (the middle always has them).
        head_dim: width of an attention head; a level has channels / head_dim heads.
        init_heads: heads of the temporal mixer right after the first convolution; 0 leaves it out.
        init_head_dim: width of each of those heads.
        context_dim: width of the context tokens; 0 leaves the cross-attention out.
        groups: channel groups of every normalisation.
        temporal_mixer: name in the family "temporal_mixer", or "package.module:Class".
        temporal_conv: whether a temporal convolution follows each residual block.
        image_concat: how the latent of the reference frame joins the noisy latents on channels.
            "first": as frame 0, followed by frames of the constant k / (t - 1), as I2VGen-XL;
            "all": repeated over the frames, with k / (t - 1) in one more channel; "none": not at
            all.
        image_tokens: whether that latent also makes context tokens.
        camera_embedding: whether to embed the camera of every frame.
        motion_embedding: whether to embed the motion magnitude of the clip.
        motion_null: embedding of a dropped motion magnitude, "learnt" or "zero".
        fps: frames per second to embed, as I2VGen-XL does; None leaves it out.
        dropout: rate in the residual blocks and the temporal convolutions.
        dtype: what the network computes in; parameters are float32.
    """

    in_channels: int = 4
    out_channels: int = 4
    width: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    head_dim: int = 64
    init_heads: int = 8
    init_head_dim: int = 64
    context_dim: int = 1024
    groups: int = 32
    temporal_mixer: str = "attention"
    temporal_conv: bool = True
    image_concat: str = "none"
    image_tokens: bool = False
    camera_embedding: bool = True
    motion_embedding: bool = True
    motion_null: str = "learnt"
    fps: float | None = None
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_t: Float[AnyArray, "b t h w c"],
        timestep: Int[AnyArray, "b"],
        conditioning: Conditioning,
        *,
        train: bool = False,
    ) -> Float[Array, "b t h w d"]:
        """Prediction for noisy latents.

        Args:
            x_t: noisy latents.
            timestep: integers, 0 next to the data.
            conditioning: prompt, cameras and motion of each clip.
            train: whether dropout is on (needs the "dropout" random stream).

        Raises:
            ValueError: sizes that do not fit each other or the network, or a condition that the
                network needs and did not get.
        """
        self._check(x_t, conditioning)
        x_t, timestep = jnp.asarray(x_t), jnp.asarray(timestep)
        conditioning = jax.tree.map(jnp.asarray, conditioning)
        embedding = self._embed(x_t, timestep, conditioning)
        context = self._context(conditioning)
        x = self._with_image(x_t, conditioning).astype(self.dtype)
        channels = [self.width * m for m in self.multipliers]
        run = {"context": context, "train": train}

        x = convolution(channels[0], dtype=self.dtype, name="conv_in")(x)
        if self.init_heads:
            mixer = lookup("temporal_mixer", self.temporal_mixer)
            options = {"heads": self.init_heads, "head_dim": self.init_head_dim}
            options |= {"groups": self.groups, "dtype": self.dtype}
            x = mixer(**options, name="init_temporal")(x)
        skips = [x]
        for i, width in enumerate(channels):
            attention = (i in self.attention_levels,) * self.blocks
            resample = "down" if i < len(channels) - 1 else None
            level = self._level(width, attention, resample, f"down_{i}")
            x, outputs = level(x, embedding, **run)
            skips += outputs
        x, _ = self._level(channels[-1], (True, False), None, "mid")(x, embedding, **run)
        for i, width in reversed(list(enumerate(channels))):
            attention = (i in self.attention_levels,) * (self.blocks + 1)
            level = self._level(width, attention, "up" if i > 0 else None, f"up_{i}")
            taken = [skips.pop() for _ in attention]
            x, _ = level(x, embedding, taken, **run)
        x = nn.silu(GroupNorm(groups=self.groups, dtype=self.dtype, name="norm_out")(x))
        out = convolution(self.out_channels, dtype=self.dtype, kernel_init=zeros, name="conv_out")
        return out(x).astype(jnp.float32)

    def _level(
        self, channels: int, attention: tuple[bool, ...], resample: str | None, name: str
    ) -> "Level":
        return Level(
            channels=channels,
            attention=attention,
            resample=resample,
            head_dim=self.head_dim,
            groups=self.groups,
            temporal_mixer=self.temporal_mixer,
            temporal_conv=self.temporal_conv,
            dropout=self.dropout,
            dtype=self.dtype,
            name=name,
        )

    def _embed(self, x_t: Array, timestep: Array, conditioning: Conditioning) -> Array:
        """Sum of the embeddings of time, fps, motion (per clip) and camera (per frame), (b t e)."""
        b, t = x_t.shape[:2]
        size = {"width": 4 * self.width, "dtype": self.dtype}
        waves = sinusoidal(timestep, self.width)
        clip = EmbeddingMLP(**size, name="time_embedding")(waves)
        if self.fps is not None:
            waves = sinusoidal(jnp.full((b,), self.fps), self.width)
            clip += EmbeddingMLP(**size, zero_init=True, name="fps_embedding")(waves)
        if self.motion_embedding:
            motion, drop = conditioning.motion, conditioning.drop_motion
            if motion is None:
                motion, drop = jnp.zeros((b,)), jnp.ones((b,), bool)
            motion_mlp = MotionEmbedding(**size, null=self.motion_null, name="motion_embedding")
            clip += motion_mlp(motion, drop)
        embedding = jnp.broadcast_to(clip[:, None], (b, t, clip.shape[-1]))
        if self.camera_embedding:
            poses = jnp.asarray(conditioning.camera).reshape(b, t, 16)
            mlp = EmbeddingMLP(**size, zero_init=True, name="camera_embedding")
            embedding = embedding + mlp(poses)
        return embedding

    def _context(self, conditioning: Conditioning) -> Array | None:
        """Text tokens, then image tokens, with dropped prompts replaced; (b n d)."""
        tokens = []
        if self.context_dim and conditioning.context is not None:
            text = conditioning.context
            null = conditioning.null_context
            tokens.append(_drop(text, conditioning.drop_prompt, 0.0 if null is None else null))
        if self.context_dim and self.image_tokens:
            image_tokens = ImageTokens(self.context_dim, self.dtype, name="image_tokens")
            image = image_tokens(jnp.asarray(conditioning.image))
            tokens.append(_drop(image, conditioning.drop_prompt, 0.0))
        if self.context_dim and not tokens:
            raise ValueError(
                "The network attends to context tokens and got none: pass"
                " Conditioning(context=...), or build it with context_dim=0."
            )
        return jnp.concatenate(tokens, axis=1).astype(self.dtype) if tokens else None

    def _with_image(self, x_t: Array, conditioning: Conditioning) -> Array:
        """Noisy latents with the reference latent behind them on the channel axis."""
        if self.image_concat == "none":
            return x_t
        b, t, h, w, _ = x_t.shape
        image = _drop(jnp.asarray(conditioning.image), conditioning.drop_prompt, 0.0)[:, None]
        position = (jnp.arange(t) / max(t - 1, 1)).reshape(1, t, 1, 1, 1)
        if self.image_concat == "first":
            image = jnp.where(position > 0, position, image)
            return jnp.concatenate([x_t, image], axis=-1)
        image = jnp.broadcast_to(image, (b, t, *image.shape[2:]))
        position = jnp.broadcast_to(position, (b, t, h, w, 1))
        return jnp.concatenate([x_t, image, position], axis=-1)

    def _check(self, x_t: AnyArray, conditioning: Conditioning) -> None:
        b, t, h, w, c = x_t.shape
        factor = 2 ** (len(self.multipliers) - 1)
        if h % factor or w % factor:
            raise ValueError(
                f"Latents of {h} x {w} cannot be halved for {len(self.multipliers)} levels: both"
                f" sides must be multiples of {factor}."
            )
        if c != self.in_channels:
            raise ValueError(
                f"The network takes {self.in_channels} channels; the latents have {c}."
            )
        if self.image_concat not in IMAGE_CONCATS:
            raise ValueError(f"image_concat is one of {IMAGE_CONCATS}, not {self.image_concat!r}.")
        if self.image_tokens and not self.context_dim:
            raise ValueError("image_tokens makes context tokens and needs a context_dim above 0.")
        camera, image = conditioning.camera, conditioning.image
        if self.camera_embedding and (camera is None or camera.shape != (b, t, 4, 4)):
            given = "none" if camera is None else f"cameras {camera.shape}"
            raise ValueError(
                f"The network needs cameras ({b}, {t}, 4, 4) for {t} frames; got {given}."
            )
        if self.image_tokens or self.image_concat != "none":
            if image is None or image.shape[:3] != (b, h, w):
                given = "none" if image is None else f"one of shape {image.shape}"
                raise ValueError(
                    f"The network needs a reference latent ({b}, {h}, {w}, c); got {given}."
                )


class Level(nn.Module):
    """The blocks of one resolution, then a resampler.

    A block is a residual block with its temporal convolution and, where `attention` says so, a
    spatial transformer and a temporal mixer, in this order.

    Attributes:
        channels: channels of every block.
        attention: one flag for every block.
        resample: "down", "up" or None.
    """

    channels: int
    attention: tuple[bool, ...]
    resample: str | None
    head_dim: int
    groups: int
    temporal_mixer: str
    temporal_conv: bool
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        embedding: Float[Array, "b t e"],
        skips: Sequence[Float[Array, "b t h w _"]] = (),
        *,
        context: Float[Array, "b n d"] | None,
        train: bool,
    ) -> tuple[Float[Array, "b t h2 w2 c2"], list[Array]]:
        """Runs the level; `skips` (one for every block, or none) are concatenated behind x.

        Returns the result and the outputs of all its parts, which the way up takes as skips.
        """
        norm = {"groups": self.groups, "dtype": self.dtype}
        drop = {"dropout": self.dropout}
        heads = {"heads": self.channels // self.head_dim, "head_dim": self.head_dim}
        if self.channels % self.head_dim:
            raise ValueError(
                f"{self.channels} channels do not split into heads of {self.head_dim}."
            )
        mixer = lookup("temporal_mixer", self.temporal_mixer)
        outputs = []
        for j, attend in enumerate(self.attention):
            if skips:
                x = jnp.concatenate([x, skips[j]], axis=-1)
            residual = ResidualBlock(self.channels, **drop, **norm, name=f"residual_{j}")
            x = residual(x, embedding, train=train)
            if self.temporal_conv:
                x = TemporalConv(**drop, **norm, name=f"temporal_conv_{j}")(x, train=train)
            if attend:
                x = SpatialTransformer(**heads, **norm, name=f"spatial_{j}")(x, context)
                x = mixer(**heads, **norm, name=f"temporal_{j}")(x)
            outputs.append(x)
        if self.resample is not None:
            resampler = {"down": Downsample, "up": Upsample}[self.resample]
            x = resampler(dtype=self.dtype, name=self.resample)(x)
            outputs.append(x)
        return x, outputs


def _drop(value: AnyArray, mask: AnyArray | None, replacement: ArrayLike) -> Array:
    """`replacement` where the per-sample mask is True."""
    value = jnp.asarray(value)
    if mask is None:
        return value
    return jnp.where(jnp.reshape(mask, (-1,) + (1,) * (value.ndim - 1)), replacement, value)


#: Named sets of fields: `SpatioTemporalUNet(**VARIANTS["tiny"])`. The class defaults are the
#: paper-scale text network.
VARIANTS: dict[str, dict[str, Any]] = {
    "text": {},
    "tiny": {  # 24 x 8 x 8 latents of 48 channels: patches of 8 x 8 pixels, for training on a CPU
        "in_channels": 48,
        "out_channels": 48,
        "width": 56,
        "multipliers": (1, 1),
        "blocks": 1,
        "attention_levels": (1,),
        "head_dim": 28,
        "init_heads": 0,
        "context_dim": 0,
        "groups": 8,
        "image_concat": "all",
        "dropout": 0.0,
    },
}
