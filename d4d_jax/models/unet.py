"""The spatio-temporal UNet of Diffusion4D.

Block structure and order are those of ModelScope's text-to-video UNet as VideoMV uses it (a camera
MLP next to the time embedding), plus Diffusion4D's motion MLP. The defaults are the paper-scale
text network; `d4d_jax.models.variants` has named sets of fields.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.embeddings import EmbeddingMLP, sinusoidal
from d4d_jax.models.image_conditioning import ImageConcat, ImageEmbedding, ImageTokens
from d4d_jax.models.layers import GroupNorm, convolution, zeros
from d4d_jax.models.level import REMATS, Blocks, Level
from d4d_jax.registry import lookup, register
from d4d_jax.typing import AnyArray

IMAGE_CONCATS = ("none", "first", "encoded", "all")


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
            "first": as frame 0, followed by frames of the constant k / (t - 1); "encoded": the same
            clip through `ImageConcat`, as I2VGen-XL; "all": repeated over the frames, with
            k / (t - 1) in one more channel; "none": not at all.
        image_tokens: whether that latent also makes context tokens.
        image_embedding: whether the embedding of the reference image by CLIP makes context tokens.
        drop_image: whether a dropped prompt drops the latent of the reference frame, too.
        static_channels: channels of the latents of a static 3D asset, 0 for a network without. They
            are further channels of the first convolution, with weights of their own that start at
            0 (`static_in`), so that the weights of a network without them fit.
        camera_embedding: whether to embed the camera of every frame.
        motion_embedding: whether to embed the motion magnitude of the clip.
        motion_embedder: name in the family "motion_embedding", or "package.module:Class".
        motion_input_scale: factor on the magnitude before it is embedded; 0.1 suits the x100 scale.
        motion_null: embedding of a dropped motion magnitude, "learnt" or "zero".
        fps: frames per second to embed, as I2VGen-XL does; None leaves it out.
        dropout: rate in the residual blocks and the temporal convolutions.
        attention: implementation, see `d4d_jax.models.attention.attend`.
        remat: what is computed again in the backward pass: "none"; "blocks", the inside of every
            residual block, temporal convolution and transformer; "dots", the same but for the
            results of matrix products.
        dtype: what the network computes in; parameters, the statistics of normalisations, softmax
            and the last convolution are float32.
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
    image_embedding: bool = False
    drop_image: bool = True
    static_channels: int = 0
    camera_embedding: bool = True
    motion_embedding: bool = True
    motion_embedder: str = "mlp"
    motion_input_scale: float = 0.1
    motion_null: str = "learnt"
    fps: float | None = None
    dropout: float = 0.1
    attention: str = "auto"
    remat: str = "none"
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
        self._check(x_t, timestep, conditioning)
        x_t, timestep = jnp.asarray(x_t), jnp.asarray(timestep)
        conditioning = jax.tree.map(jnp.asarray, conditioning)
        embedding = self._embed(x_t, timestep, conditioning)
        context = self._context(conditioning)
        x = self._with_image(x_t, conditioning).astype(self.dtype)
        channels = [self.width * m for m in self.multipliers]
        run = {"context": context, "train": train}

        x = convolution(channels[0], dtype=self.dtype, name="conv_in")(x)
        if self.static_channels:
            options = {"use_bias": False, "kernel_init": zeros, "dtype": self.dtype}
            static = _drop(jnp.asarray(conditioning.static), conditioning.drop_static, 0.0)
            static = static.astype(self.dtype)
            x = x + convolution(channels[0], **options, name="static_in")(static)
        if self.init_heads:
            heads = {"heads": self.init_heads, "head_dim": self.init_head_dim}
            x = self._blocks().mixer(**heads, name="init_temporal")(x)
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
        # In float32: rounding here would be rounding the prediction.
        x = nn.silu(GroupNorm(groups=self.groups, name="norm_out")(x))
        return convolution(self.out_channels, kernel_init=zeros, name="conv_out")(x)

    def _level(
        self, channels: int, attention: tuple[bool, ...], resample: str | None, name: str
    ) -> Level:
        return Level(
            channels=channels,
            attends=attention,
            resample=resample,
            head_dim=self.head_dim,
            temporal_conv=self.temporal_conv,
            blocks=self._blocks(),
            name=name,
        )

    def _blocks(self) -> Blocks:
        return Blocks(
            self.temporal_mixer,
            self.groups,
            self.dropout,
            self.attention,
            self.remat,
            jnp.dtype(self.dtype),
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
            make = lookup("motion_embedding", self.motion_embedder)
            options = {"null": self.motion_null, "input_scale": self.motion_input_scale}
            clip += make(**size, **options, name="motion_embedding")(motion, drop)
        embedding = jnp.broadcast_to(clip[:, None], (b, t, clip.shape[-1]))
        if self.camera_embedding:
            poses = jnp.asarray(conditioning.camera).reshape(b, t, 16)
            mlp = EmbeddingMLP(**size, zero_init=True, name="camera_embedding")
            embedding = embedding + mlp(poses)
        return embedding

    def _context(self, conditioning: Conditioning) -> Array | None:
        """Tokens of the text, the image and its embedding, dropped ones replaced; (b n d)."""
        tokens = []
        if self.context_dim and conditioning.context is not None:
            text = conditioning.context
            null = conditioning.null_context
            tokens.append(_drop(text, conditioning.drop_text, 0.0 if null is None else null))
        if self.image_tokens:
            make = ImageTokens(self.context_dim, dtype=self.dtype, name="image_tokens")
            image = make(jnp.asarray(conditioning.image))
            tokens.append(_drop(image, self._image_mask(conditioning), 0.0))
        if self.image_embedding:
            make = ImageEmbedding(4 * self.width, dtype=self.dtype, name="image_embedding")
            embedding = jnp.asarray(conditioning.image_embedding)
            tokens.append(make(_drop(embedding, conditioning.drop_image, 0.0)))
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
        image = jnp.asarray(conditioning.image)
        image = _drop(image, self._image_mask(conditioning), 0.0)[:, None]
        position = (jnp.arange(t) / max(t - 1, 1)).reshape(1, t, 1, 1, 1)
        if self.image_concat in ("first", "encoded"):
            image = jnp.where(position > 0, position, image)
            if self.image_concat == "encoded":
                image = ImageConcat(self.dtype, name="image_concat")(image.astype(self.dtype))
            return jnp.concatenate([x_t, image], axis=-1)
        image = jnp.broadcast_to(image, (b, t, *image.shape[2:]))
        position = jnp.broadcast_to(position, (b, t, h, w, 1))
        return jnp.concatenate([x_t, image, position], axis=-1)

    def _image_mask(self, conditioning: Conditioning) -> AnyArray | None:
        return conditioning.drop_image if self.drop_image else None

    def _check(self, x_t: AnyArray, timestep: AnyArray, conditioning: Conditioning) -> None:
        if x_t.ndim != 5:
            raise ValueError(
                "Latents are (clips, frames, height, width, channels); these have the shape"
                f" {x_t.shape}."
            )
        b, t, h, w, c = x_t.shape
        if jnp.shape(timestep) != (b,):
            raise ValueError(
                f"The network needs timesteps ({b},), one for each clip; got {jnp.shape(timestep)}."
            )
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
        if self.remat not in REMATS:
            raise ValueError(f"remat is one of {tuple(REMATS)}, not {self.remat!r}.")
        if (self.image_tokens or self.image_embedding) and not self.context_dim:
            raise ValueError(
                "image_tokens and image_embedding make context tokens and need a context_dim above"
                " 0."
            )
        d, uses_image = self.context_dim, self.image_tokens or self.image_concat != "none"
        static = (b, t, h, w, self.static_channels)
        needed = {
            "camera": ("cameras", self.camera_embedding, (b, t, 4, 4)),
            "image": ("a reference latent", uses_image, (b, h, w, None)),
            "image_embedding": ("a reference image's embedding", self.image_embedding, (b, d)),
            "static": ("the latents of a static asset", self.static_channels, static),
            "context": ("a context", d and conditioning.context is not None, (b, None, d)),
        }
        if d and conditioning.context is not None and conditioning.null_context is not None:
            tokens = conditioning.context.shape[1]
            needed["null_context"] = ("a null context", True, (b, tokens, d))
        for name in ("motion", "drop_text", "drop_image", "drop_static", "drop_motion"):
            used = getattr(conditioning, name) is not None
            needed[name] = (f"a {name!r} for each clip", used, (b,))
        for name, (thing, used, shape) in needed.items():
            given = getattr(conditioning, name)
            if used and (given is None or not _fits(given.shape, shape)):
                sizes = ", ".join("any" if size is None else str(size) for size in shape)
                got = "none" if given is None else f"{given.shape}"
                raise ValueError(f"The network needs {thing} ({sizes}); got {got}.")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether a shape is the wanted one, where None stands for any size."""
    return len(shape) == len(wanted) and all(
        w in (None, n) for n, w in zip(shape, wanted, strict=True)
    )


def _drop(value: AnyArray, mask: AnyArray | None, replacement: ArrayLike) -> Array:
    """`replacement` where the per-sample mask is True."""
    value = jnp.asarray(value)
    if mask is None:
        return value
    return jnp.where(jnp.reshape(mask, (-1,) + (1,) * (value.ndim - 1)), replacement, value)
