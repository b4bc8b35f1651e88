"""Prompts: from what a person gives (an image, a sentence) to what a network is told of it.

A prompt encoder is a small static object with `encode(params, prompt, size=..., to_latents=...)`;
its `params` are a pytree of arrays. Register your own in the family "prompt".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d4d_jax import clips
from d4d_jax.models import clip
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.tokenizer import load_tokenizer
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray, PyTree

#: An image (h, w, 3 or 4) in [0, 1], or a sentence.
Prompt: TypeAlias = AnyArray | str

#: Latents (1, h, w, c) of an image (1, h, w, 4), colour on white and alpha, all in [-1, 1].
ToLatents: TypeAlias = Callable[[Array], Array]

#: What VideoMV's unconditional branch is told, in training and in sampling.
NEGATIVE = (
    "Distorted, discontinuous, Ugly, blurry, low resolution, disfigured, disconnected limbs,"
    " Ugly faces, incomplete arms"
)


@runtime_checkable
class PromptEncoder(Protocol):
    """Makes the conditioning of one clip (batch axis 1), without cameras and motion.

    Attributes:
        reads: what a prompt is, "image" or "text".
    """

    reads: ClassVar[str]

    def encode(
        self, params: PyTree, prompt: Prompt, /, *, size: int, to_latents: ToLatents
    ) -> Conditioning:
        """The conditioning of a prompt for frames of `size` x `size` pixels."""
        ...


@register("prompt", "image")
@dataclasses.dataclass(frozen=True)
class ImagePrompt:
    """The latent of the image, and nothing else; no parameters."""

    reads: ClassVar[str] = "image"

    def encode(
        self, params: PyTree, prompt: Prompt, /, *, size: int, to_latents: ToLatents
    ) -> Conditioning:
        """Raises ValueError for a sentence, or an image with neither 3 nor 4 channels."""
        image = prepare_image(_image(prompt), size)
        return Conditioning(image=to_latents(jnp.asarray(image)[None]))


@register("prompt", "text")
@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """Tokens of a sentence by CLIP's text tower; `params` are {"text": its parameters}.

    Attributes:
        variant: name in `d4d_jax.models.clip.VARIANTS`.
        vocabulary: file or folder for `load_tokenizer`; None finds that of an installed
            open_clip_torch.
        suffix: put behind the sentence; VideoMV was trained with this one.
        negative: the sentence of the unconditional branch.
    """

    reads: ClassVar[str] = "text"

    variant: str = "vit_h_14"
    vocabulary: str | None = None
    suffix: str = ", 3d asset"
    negative: str = NEGATIVE

    def encode(
        self, params: PyTree, prompt: Prompt, /, *, size: int, to_latents: ToLatents
    ) -> Conditioning:
        """Raises ValueError for an image, and as `load_tokenizer`."""
        if not isinstance(prompt, str):
            raise ValueError("This model is prompted by a sentence, not by an image.")
        context = self.encode_texts(_tower(params, "text"), [prompt + self.suffix, self.negative])
        return Conditioning(context=context[:1], null_context=context[1:])

    def encode_texts(self, params: PyTree, texts: list[str]) -> Float[Array, "b n d"]:
        """The tokens of sentences, as they are, that a network attends to."""
        tokenize = load_tokenizer(self.vocabulary)
        return _text_states(self.variant, params, jnp.asarray(tokenize(texts)))


@register("prompt", "image_text")
@dataclasses.dataclass(frozen=True)
class ImageTextPrompt(TextPrompt):
    """I2VGen-XL's prompt: the latent of the image, its embedding by CLIP, and a caption.

    `params` are {"text": ..., "image": ...}, the parameters of CLIP's towers.

    Attributes:
        suffix: the whole caption; VideoMV was trained without any.
    """

    reads: ClassVar[str] = "image"

    suffix: str = ""

    def encode(
        self, params: PyTree, prompt: Prompt, /, *, size: int, to_latents: ToLatents
    ) -> Conditioning:
        """Raises ValueError for a sentence, a bad image, and as `load_tokenizer`."""
        image = jnp.asarray(prepare_image(_image(prompt), size))[None]
        context = self.encode_texts(_tower(params, "text"), [self.suffix, self.negative])
        colour = (image[..., :3] + 1) / 2
        return Conditioning(
            image=to_latents(image),
            image_embedding=_image_embedding(self.variant, _tower(params, "image"), colour),
            context=context[:1],
            null_context=context[1:],
        )


def prepare_image(image: Float[AnyArray, "h w c"], size: int) -> Float[np.ndarray, "s s 4"]:
    """A prompt as the networks see it: square, on white, colour and alpha in [-1, 1].

    Args:
        image: (h, w, 3 or 4) in [0, 1]. It is padded with white to a square, then resized. Without
            alpha, pixels that differ from white count as the object.
        size: height and width of the result.

    Raises:
        ValueError: the image has neither 3 nor 4 channels.
    """
    image = np.asarray(image, np.float32)
    if image.shape[-1] not in (3, 4):
        raise ValueError(
            f"A prompt image has 3 channels (RGB) or 4 (RGBA); this one has {image.shape[-1]}."
        )
    if image.shape[-1] == 4:
        alpha = image[..., 3:]
        color = image[..., :3] * alpha + 1 - alpha
    else:
        color = image
        alpha = (image.min(axis=-1, keepdims=True) < 0.98).astype(np.float32)
    rgba = np.concatenate([color, alpha], axis=-1)
    height, width = rgba.shape[:2]
    side = max(height, width)
    square = np.tile(np.array([1, 1, 1, 0], np.float32), (side, side, 1))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgba
    return 2 * clips.resize(square[None], size, size)[0] - 1


def _tower(params: PyTree, name: str) -> PyTree:
    if name not in params:
        raise ValueError(
            "The prompts of this model are read by CLIP, but its weights, "
            f"{name}.safetensors, are not in the model's folder."
        )
    return params[name]


def _image(prompt: Prompt) -> AnyArray:
    if isinstance(prompt, str):
        raise ValueError(f"This model is prompted by an image, not by the sentence {prompt!r}.")
    return prompt


@functools.partial(jax.jit, static_argnums=0)
def _text_states(variant: str, params: PyTree, tokens: Int[Array, "b n"]) -> Array:
    tower = clip.TextEncoder(**_sizes(variant, "text"))
    return jnp.asarray(tower.apply({"params": params}, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _image_embedding(variant: str, params: PyTree, image: Float[Array, "b h w 3"]) -> Array:
    tower = clip.ImageEncoder(**_sizes(variant, "image"))
    return jnp.asarray(tower.apply({"params": params}, clip.preprocess_image(image, tower.size)))


def _sizes(variant: str, tower: str) -> dict[str, Any]:
    if variant not in clip.VARIANTS:
        raise ValueError(f"Unknown CLIP {variant!r}; known: {', '.join(clip.VARIANTS)}.")
    return clip.VARIANTS[variant][tower]
