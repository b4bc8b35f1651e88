"""The text and image towers of CLIP (Radford et al. 2021, arXiv 2103.00020), as VideoMV uses them.

Architecture and epsilons are those of OpenCLIP's ViT-H/14; OpenAI's ViT-L/14 differs in sizes and
in its activation. The parameters come from a checkpoint; everything else of a prompt is here::

    tokenize = load_tokenizer("bpe_simple_vocab_16e6.txt.gz")
    text = TextEncoder(**VARIANTS["vit_h_14"]["text"])
    tokens = tokenize("a panda dancing, 3d asset")                        # (1, 77)
    context = text.apply({"params": text_params}, tokens)                 # (1, 77, 1024)

    image = ImageEncoder(**VARIANTS["vit_h_14"]["image"])
    pixels = preprocess_image(frame[None])                                # (1, 224, 224, 3)
    embedding = image.apply({"params": image_params}, pixels)             # (1, 1024)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from d4d_jax.models.layers import Dense, fan_in_uniform
from d4d_jax.typing import AnyArray

#: Mean and standard deviation of a pixel, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class TextEncoder(nn.Module):
    """Transformer over the tokens of a caption; every token sees those before it.

    There is no mask for padding: tokens behind the end of the text are part of the context, so the
    padding has to be the one of the training (see `d4d_jax.models.tokenizer`).

    Attributes:
        width: channels of a token.
        layers: blocks of the published network.
        heads: attention heads of a block.
        mlp: hidden channels of a block's MLP.
        vocabulary: number of token ids.
        positions: most tokens of a text.
        skip_last: blocks at the end that are left out, and have no parameters. 1 gives the
            penultimate layer, which diffusion models attend to.
        projection: channels of `embed`, or None for a network without its projection.
        activation: "gelu" (exact) or "quick_gelu" (OpenAI's checkpoints).
        implementation: of `jax.nn.dot_product_attention`: "xla", "cudnn" (half precision, on a
            GPU), or None to leave it to JAX.
        dtype: what the network computes in; parameters are float32.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    vocabulary: int = 49408
    positions: int = 77
    skip_last: int = 1
    projection: int | None = None
    activation: str = "gelu"
    implementation: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "b n"], *, pooled: bool = False
    ) -> Float[Array, "b n d"] | Float[Array, "b p"]:
        """States of the last block that is left, behind the final normalisation.

        Args:
            tokens: ids, end of text and padding included. An id beyond the vocabulary gives NaN.
            pooled: whether to return the embedding of the text instead: the state of the end of
                the text (the first of the highest ids), projected, not normalised. For CLIP's own
                score the network needs skip_last=0 and a `projection`.

        Raises:
            ValueError: more tokens than positions, no block left, or `pooled` without a projection.
        """
        tokens = jnp.asarray(tokens)
        if tokens.shape[1] > self.positions:
            raise ValueError(
                f"The text encoder takes {self.positions} tokens at most, not {tokens.shape[1]}."
            )
        if not 0 <= self.skip_last < self.layers:
            raise ValueError(
                f"The text encoder cannot leave out {self.skip_last} of {self.layers} blocks."
            )
        normal = nn.initializers.normal(0.02)
        table = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="token_embedding")
        position = self.param("position_embedding", normal, (self.positions, self.width))
        x = table(tokens) + position[: tokens.shape[1]]
        x = x.astype(self.dtype)
        for i in range(self.layers - self.skip_last):
            x = _block(self, causal=True, name=f"block_{i}")(x)
        x = _norm("norm_final", self.dtype)(x).astype(jnp.float32)
        if not pooled:
            return x
        if self.projection is None:
            raise ValueError("This text encoder has no projection: build it with projection=...")
        end = jnp.take_along_axis(x, tokens.argmax(-1)[:, None, None], axis=1)[:, 0]
        return Dense(self.projection, use_bias=False, name="projection")(end)


class ImageEncoder(nn.Module):
    """Vision transformer over patches and a class token.

    Attributes:
        width: channels of a token.
        layers: blocks.
        heads: attention heads of a block.
        mlp: hidden channels of a block's MLP.
        patch: side of a patch in pixels.
        size: side of an image in pixels.
        projection: channels of the embedding.
        activation, implementation, dtype: as in `TextEncoder`.
    """

    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    patch: int = 14
    size: int = 224
    projection: int = 1024
    activation: str = "gelu"
    implementation: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[AnyArray, "b h w c"]) -> Float[Array, "b p"]:
        """Embeddings of images that `preprocess_image` has made; not normalised.

        Raises:
            ValueError: the images are not size x size with 3 channels.
        """
        images = jnp.asarray(images)
        if images.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"The image encoder takes images of {self.size} x {self.size} x 3, not"
                f" {' x '.join(map(str, images.shape[1:]))}; see preprocess_image."
            )
        patches = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            use_bias=False,
            kernel_init=fan_in_uniform,
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        patches = patches.reshape(len(images), -1, self.width)
        normal = nn.initializers.normal(self.width**-0.5)
        first = self.param("class_embedding", normal, (self.width,))
        first = jnp.broadcast_to(first, (len(images), 1, self.width))
        x = jnp.concatenate([first.astype(self.dtype), patches], axis=1)
        x = x + self.param("position_embedding", normal, x.shape[1:]).astype(self.dtype)
        x = _norm("norm_pre", self.dtype)(x)
        for i in range(self.layers):
            x = _block(self, causal=False, name=f"block_{i}")(x)
        x = _norm("norm_post", self.dtype)(x[:, 0])
        x = Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(x)
        return x.astype(jnp.float32)


class Block(nn.Module):
    """Attention and MLP, each pre-normalised and added to its input."""

    heads: int
    mlp: int
    activation: str
    causal: bool
    implementation: str | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        attention = SelfAttention(
            self.heads, self.causal, self.implementation, self.dtype, name="attention"
        )
        x = x + attention(_norm("norm_1", self.dtype)(x))
        mlp = MLP(self.mlp, self.activation, self.dtype, name="mlp")
        return x + mlp(_norm("norm_2", self.dtype)(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; `causal` hides what comes after a token."""

    heads: int
    causal: bool
    implementation: Any
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        if c % self.heads:
            raise ValueError(f"{c} channels do not split into {self.heads} heads.")
        query, key, value = (
            Dense(c, dtype=self.dtype, name=name)(x).reshape(b, n, self.heads, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=self.causal, implementation=self.implementation
        )
        return Dense(c, dtype=self.dtype, name="out")(mixed.reshape(b, n, c))


class MLP(nn.Module):
    """Linear layer, activation, linear layer."""

    hidden: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"The activation is one of {tuple(_ACTIVATIONS)}, not {self.activation!r}."
            )
        hidden = Dense(self.hidden, dtype=self.dtype, name="linear_1")(x)
        hidden = _ACTIVATIONS[self.activation](hidden)
        return Dense(x.shape[-1], dtype=self.dtype, name="linear_2")(hidden)


def preprocess_image(
    images: Float[AnyArray, "*b h w c"],
    size: int = 224,
    *,
    method: str = "linear",
    antialias: bool = True,
) -> Float[Array, "*b size size 3"]:
    """Frames in [0, 1] as the image tower takes them: square, resized, pixels normalised.

    The middle square is cut out and resized. VideoMV resizes with Pillow's bilinear filter and
    OpenCLIP with its bicubic one (`method="cubic"`); both widen the filter when they shrink, as
    `antialias` does here. Pillow also rounds to 8 bits, which this does not.

    Raises:
        ValueError: the frames have another number of channels.
    """
    images = jnp.asarray(images, jnp.float32)
    if images.shape[-1] != 3:
        raise ValueError(
            f"CLIP takes frames with 3 channels, not {images.shape[-1]}; composite those with"
            " alpha."
        )
    h, w = images.shape[-3:-1]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    images = images[..., top : top + side, left : left + side, :]
    shape = (*images.shape[:-3], size, size, 3)
    images = jax.image.resize(images, shape, method, antialias=antialias)
    return jnp.asarray((images - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD))


def _block(tower: TextEncoder | ImageEncoder, *, causal: bool, name: str) -> Block:
    return Block(
        heads=tower.heads,
        mlp=tower.mlp,
        activation=tower.activation,
        causal=causal,
        implementation=tower.implementation,
        dtype=tower.dtype,
        name=name,
    )


def _norm(name: str, dtype: DTypeLike) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


#: Named sets of fields of the two towers: `TextEncoder(**VARIANTS["tiny"]["text"])`. Parameters of
#: "vit_h_14": text 340,387,840 (23 of 24 blocks, no projection), image 632,076,800 (with it).
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "vit_h_14": {"text": {}, "image": {}},
    "vit_l_14": {  # OpenAI's; the text tower is the one of Stable Diffusion 1
        "text": {
            "width": 768,
            "layers": 12,
            "heads": 12,
            "mlp": 3072,
            "skip_last": 0,
            "activation": "quick_gelu",
        },
        "image": {
            "width": 1024,
            "layers": 24,
            "mlp": 4096,
            "projection": 768,
            "activation": "quick_gelu",
        },
    },
    "tiny": {
        "text": {"width": 64, "layers": 3, "heads": 4, "mlp": 128, "vocabulary": 1024},
        "image": {
            "width": 64,
            "layers": 2,
            "heads": 4,
            "mlp": 128,
            "patch": 16,
            "size": 64,
            "projection": 64,
        },
    },
}
