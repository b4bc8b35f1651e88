"""What a network is told besides the noisy latents and the timestep."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from d4d_jax import pytree
from d4d_jax.typing import AnyArray


@pytree.dataclass
class Conditioning:
    """The prompt, the cameras and the motion of a batch of clips; any of them may be absent.

    Attributes:
        image: latent of the reference frame.
        image_embedding: of the reference image by CLIP.
        static: latents of the orbit of a static 3D asset that is to move, by the same cameras.
        context: text tokens.
        camera: camera-to-world matrices with OpenGL / Blender axes
            (`Camera.opengl_camera_to_world`), which the network reads row by row.
        motion: motion magnitude of every clip (Eq. 1, the x100 scale).
        null_context: tokens that replace the text of samples whose prompt is dropped, for example
            the embedding of a negative prompt; zeros when absent.
        drop_text: True where the text is dropped (replaced by `null_context`).
        drop_image: True where the image and its embedding are dropped (zeros).
        drop_static: True where the static asset is dropped (zeros).
        drop_motion: True where the motion magnitude is replaced by the null embedding.
    """

    image: Float[AnyArray, "b h w c"] | None = None
    image_embedding: Float[AnyArray, "b e"] | None = None
    static: Float[AnyArray, "b t h w c"] | None = None
    context: Float[AnyArray, "b n d"] | None = None
    camera: Float[AnyArray, "b t 4 4"] | None = None
    motion: Float[AnyArray, "b"] | None = None
    null_context: Float[AnyArray, "b n d"] | None = None
    drop_text: Bool[AnyArray, "b"] | None = None
    drop_image: Bool[AnyArray, "b"] | None = None
    drop_static: Bool[AnyArray, "b"] | None = None
    drop_motion: Bool[AnyArray, "b"] | None = None

    @property
    def batch_size(self) -> int:
        """Number of clips; raises ValueError when nothing at all is given."""
        leaves = jax.tree.leaves(self)
        if not leaves:
            raise ValueError("An empty Conditioning has no batch size.")
        return leaves[0].shape[0]

    def without_prompt(self, *, static: bool = False) -> "Conditioning":
        """Prompt and motion dropped, camera kept: the condition of eps(z_t, t) in Eq. 3.

        Args:
            static: whether a static asset is dropped as well; a network that never was without
                one in training (`DiffusionObjective.drop_static`) should keep it.
        """
        if not jax.tree.leaves(self):
            return self
        dropped = jnp.ones((self.batch_size,), bool)
        names = ("drop_text", "drop_image", "drop_motion", *(("drop_static",) if static else ()))
        return dataclasses.replace(self, **dict.fromkeys(names, dropped))

    def with_motion(self, motion: ArrayLike) -> "Conditioning":
        """The same conditions with another motion magnitude: one number, or one for every clip."""
        motion = jnp.broadcast_to(jnp.asarray(motion, jnp.float32), (self.batch_size,))
        return dataclasses.replace(self, motion=motion, drop_motion=None)

    @staticmethod
    def concatenate(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Joins batches. A mask or a motion magnitude that only some parts have may be absent in
        the others: nothing is dropped there, and the motion is, respectively.

        Raises:
            ValueError: another condition is given in some parts and absent in others, or its sizes
                differ.
        """
        if any(part.motion is not None for part in parts):
            parts = [
                part if part.motion is not None else part._with_null_motion() for part in parts
            ]
        fields = {}
        for field in dataclasses.fields(Conditioning):
            values = [getattr(part, field.name) for part in parts]
            absent = [value is None for value in values]
            if all(absent):
                continue
            if any(absent) and field.name.startswith("drop_"):
                kept = [jnp.zeros((part.batch_size,), bool) for part in parts]
                values = [k if v is None else v for k, v in zip(kept, values, strict=True)]
            elif any(absent):
                raise ValueError(f"Only some of the conditionings to join have {field.name!r}.")
            sizes = sorted({value.shape[1:] for value in values})
            if len(sizes) > 1:
                listed = " and ".join(map(str, sizes))
                raise ValueError(
                    f"The conditionings to join have {field.name!r} of different sizes: {listed}."
                )
            fields[field.name] = jnp.concatenate(values)
        return Conditioning(**fields)

    def _with_null_motion(self) -> "Conditioning":
        b = self.batch_size
        return dataclasses.replace(self, motion=jnp.zeros((b,)), drop_motion=jnp.ones((b,), bool))
