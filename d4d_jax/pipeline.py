"""Prompt image -> orbital video of a moving object: the object people call.

    pipeline = OrbitPipeline.load()                       # the embedded tiny model
    clip = pipeline(clips.read_image("rabbit.png"), motion=8.0)
    clip.dynamic                                          # (24, 64, 64, 3) in [0, 1]

A call samples two orbits of the prompt from the same noise: the dynamic one at the requested motion
magnitude, and the static one at magnitude 0, which the coarse stage of the reconstruction needs
(Diffusion4D, section 3.4).
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d4d_jax import cameras, clips, registry, sampling
from d4d_jax.clips import OrbitClip
from d4d_jax.guidance import ThreeDAware
from d4d_jax.models import bundle, unet, vae
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.sampling import DDIM, Stepper
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.typing import AnyArray, Codec, Guidance, PyTree

#: The model that is shipped with the package; see assets/README.md for how it was trained.
EMBEDDED = Path(__file__).parent / "assets" / "tiny.npz"

#: Modules whose import registers the names that a model file refers to.
_PROVIDERS = (unet, vae)


@dataclasses.dataclass(frozen=True)
class OrbitPipeline:
    """A trained network with everything that sampling from it needs.

    Attributes:
        network: Linen module, called as `network.apply({"params": params}, x_t, t, conditioning)`.
        params: its parameters.
        codec: maps images to latents and back.
        codec_params: its parameters.
        schedule: the noise schedule the network was trained with.
        num_frames: frames of a clip.
        size: height and width of a frame in pixels.
        guidance: of the dynamic orbit.
        static_guidance: of the static orbit, which is sampled at motion magnitude 0.
        stepper: moves from one noise level to the next.
        spacing: of the timesteps; a schedule with zero terminal SNR wants "trailing".
    """

    network: Any
    params: PyTree
    codec: Codec
    codec_params: PyTree
    schedule: NoiseSchedule
    num_frames: int = 24
    size: int = 64
    guidance: Guidance = dataclasses.field(default=ThreeDAware(w1=0.0, w2=0.5))
    static_guidance: Guidance = dataclasses.field(default=ThreeDAware(w1=0.0, w2=0.0))
    stepper: Stepper = dataclasses.field(default=DDIM())
    spacing: str = "leading"

    @classmethod
    def load(cls, path: str | os.PathLike = EMBEDDED) -> "OrbitPipeline":
        """Reads a model file written by `d4d_jax.models.bundle`; by default the embedded model.

        Raises:
            FileNotFoundError, ValueError: no such file, or no model file.
        """
        return cls.from_parts(*bundle.load_bundle(path))

    @classmethod
    def from_parts(
        cls, params: PyTree, codec_params: PyTree, config: Mapping[str, Any]
    ) -> "OrbitPipeline":
        """The pipeline of a network that was trained with `config` (see `experiments/configs`).

        Args:
            params: parameters of the network.
            codec_params: parameters of the codec.
            config: at least the keys `network`, `codec`, `schedule` and `data`.
        """
        size = config["data"]["size"]
        codec = registry.build("codec", config["codec"])
        schedule = registry.build("schedule", config["schedule"])
        image = jax.ShapeDtypeStruct((size, size, 4), jnp.float32)
        channels = jax.eval_shape(codec.encode, codec_params, image).shape[-1]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config["network"].items()}
        fields |= {"in_channels": channels, "out_channels": channels}
        return cls(
            network=registry.build("network", fields),
            params=params,
            codec=codec,
            codec_params=codec_params,
            schedule=schedule,
            num_frames=config["data"]["num_frames"],
            size=size,
            spacing="trailing" if schedule.alphas_cumprod[-1] == 0 else "leading",
        )

    def __call__(
        self,
        image: Float[AnyArray, "h w c"],
        *,
        motion: float = 8.0,
        num_steps: int = 50,
        seed: int = 0,
        caption: str = "",
    ) -> OrbitClip:
        """Samples the dynamic and the static orbit of the object in `image`.

        Args:
            image: (h, w, 3 or 4) in [0, 1], of any size: the object seen from the front. Without
                alpha it should stand on white.
            motion: motion magnitude m of Eq. 1; 0 holds still.
            num_steps: calls of the sampler.
            seed: of the noise; the same seed gives the same clip on the same platform.
            caption: passed on to the clip.

        Raises:
            ValueError: the image has another number of channels, the motion is negative, or
                `num_steps` is not between 1 and the length of the schedule.
        """
        if motion < 0:
            raise ValueError(f"The motion magnitude must be 0 or more; got {motion}.")
        orbit = cameras.orbit(self.num_frames, width=self.size, height=self.size)
        rgba = jnp.asarray(prepare_image(image, self.size))
        latent = self.codec.encode(self.codec_params, rgba)
        noise = jax.random.normal(jax.random.key(seed), (self.num_frames, *latent.shape))
        spec = {"name": self.spacing, "train_steps": self.schedule.num_steps}
        timesteps = registry.build("timesteps", spec | {"num_steps": num_steps})
        sample = functools.partial(_sample, self.network, self.codec, self.stepper)
        inputs = (self.params, self.codec_params, self.schedule, latent, noise)
        poses = jnp.asarray(orbit.opengl_camera_to_world)
        steps = tuple(timesteps.tolist())
        fields: dict[str, Any] = {}
        for view, guide, magnitude in (
            ("dynamic", self.guidance, motion),
            ("static", self.static_guidance, 0.0),
        ):
            frames = np.asarray(sample(guide, steps, *inputs, poses, jnp.asarray([magnitude])))
            fields[view] = frames[..., :3]
            if frames.shape[-1] == 4:
                fields[f"{view}_alpha"] = frames[..., 3]
        return clips.standard_clip(
            self.num_frames, self.size, self.size, motion=motion, caption=caption, **fields
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(
    network: Any,
    codec: Codec,
    stepper: Stepper,
    guide: Guidance,
    timesteps: tuple[int, ...],
    params: PyTree,
    codec_params: PyTree,
    schedule: NoiseSchedule,
    latent: Array,
    noise: Array,
    poses: Array,
    motion: Array,
) -> Array:
    """Frames (t, h, w, c) in [0, 1] of one orbit."""
    conditioning = Conditioning(image=latent[None], camera=poses[None], motion=motion)
    denoise = guide(functools.partial(network.apply, {"params": params}))
    latents = sampling.sample(
        denoise, schedule, stepper, noise[None], conditioning, timesteps=np.asarray(timesteps)
    )
    return jnp.clip((codec.decode(codec_params, latents[0]) + 1) / 2, 0, 1)
