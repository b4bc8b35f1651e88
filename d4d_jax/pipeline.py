"""Prompt -> orbital video of a moving object: the object people call.

    pipeline = OrbitPipeline.load()                       # the embedded tiny model
    clip = pipeline(clips.read_image("rabbit.png"), motion=8.0)
    clip.dynamic                                          # (24, 64, 64, 3) in [0, 1]

    pipeline = OrbitPipeline.load("models/diffusion4d")   # a folder of converted weights
    clip = pipeline("a panda dancing")

A call samples two orbits of the prompt from the same noise: the dynamic one at the requested motion
magnitude, and the static one at magnitude 0, which the coarse stage of the reconstruction needs
(Diffusion4D, section 3.4). A network without motion (VideoMV's) samples the static one only.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d4d_jax import cameras, clips, conversion, guidance, registry, sampling
from d4d_jax.clips import Color, OrbitClip
from d4d_jax.conversion.files import read_metadata
from d4d_jax.guidance import ThreeDAware
from d4d_jax.models import autoencoder_kl, bundle, unet, vae, variants
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.prompts import ImagePrompt, Prompt, PromptEncoder
from d4d_jax.presets import PRESETS
from d4d_jax.sampling import DDIM, Stepper
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.typing import Codec, Guidance, PyTree

#: The model that is shipped with the package; see assets/README.md for how it was trained.
EMBEDDED = Path(__file__).parent / "assets" / "tiny.npz"

#: Modules whose import registers the names that a model file refers to.
_PROVIDERS = (unet, vae, autoencoder_kl)


@dataclasses.dataclass(frozen=True)
class OrbitPipeline:
    """A trained network with everything that sampling from it needs.

    Attributes:
        network: Linen module, called as `network.apply({"params": params}, x_t, t, conditioning)`.
        params: its parameters.
        codec: maps images to latents and back.
        codec_params: its parameters.
        schedule: the noise schedule the network was trained with.
        prompt: what a prompt is, and what the network is told of it.
        prompt_params: parameters of its networks.
        num_frames: frames of a clip.
        size: height and width of a frame in pixels.
        orbit: further arguments of `cameras.orbit`: where the cameras stand.
        background: the colour of a frame where nothing is, RGB in [0, 1].
        guidance: of the dynamic orbit.
        static_guidance: of the static orbit, which is sampled at motion magnitude 0.
        static_network: the frozen 3D-aware network of Eq. 3 (its fields as those of `network`), or
            None for the network itself at motion magnitude 0.
        static_params: its parameters.
        stepper: moves from one noise level to the next.
        spacing: of the timesteps; a schedule with zero terminal SNR wants "trailing".
    """

    network: Any
    params: PyTree
    codec: Codec
    codec_params: PyTree
    schedule: NoiseSchedule
    prompt: PromptEncoder = dataclasses.field(default=ImagePrompt())
    prompt_params: PyTree = dataclasses.field(default_factory=dict)
    num_frames: int = 24
    size: int = 64
    orbit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    background: Color = clips.WHITE
    guidance: Guidance = dataclasses.field(default=ThreeDAware(w1=0.0, w2=0.5))
    static_guidance: Guidance = dataclasses.field(default=ThreeDAware(w1=0.0, w2=0.0))
    static_network: Any = None
    static_params: PyTree = None
    stepper: Stepper = dataclasses.field(default=DDIM())
    spacing: str = "leading"

    @classmethod
    def load(cls, path: str | os.PathLike = EMBEDDED) -> "OrbitPipeline":
        """Reads a model; by default the embedded one.

        Args:
            path: a file written by `d4d_jax.models.bundle`, or a folder of converted weights:
                `network.safetensors` and `codec.safetensors`, for prompts that are read by CLIP
                `text.safetensors` and `image.safetensors`, and, if it is not to be found
                elsewhere, CLIP's vocabulary (`load_tokenizer`). What they are follows from the
                network's file, which names one of `d4d_jax.presets.PRESETS`, or from `model.json`:
                a configuration as for `from_parts`, or {"preset": ...} and what differs from it.

        Raises:
            FileNotFoundError, ValueError: no such file, or no model.
        """
        path = Path(path)
        if path.is_dir():
            return _from_folder(cls, path)
        return cls.from_parts(*bundle.load_bundle(path))

    @classmethod
    def from_parts(
        cls,
        params: PyTree,
        codec_params: PyTree,
        config: Mapping[str, Any],
        prompt_params: PyTree | None = None,
    ) -> "OrbitPipeline":
        """The pipeline of a network that was trained with `config` (see `experiments/configs`).

        Args:
            params: parameters of the network.
            codec_params: parameters of the codec.
            config: at least the keys `network`, `codec`, `schedule` and `data`; `prompt`,
                `guidance`, `orbit` and `spacing` as in `d4d_jax.presets`.
            prompt_params: parameters of the prompt's networks, if it has any.
        """
        data = config["data"]
        codec = registry.build("codec", config["codec"])
        schedule = registry.build("schedule", config["schedule"])
        image = jax.ShapeDtypeStruct((data["size"], data["size"], 4), jnp.float32)
        channels = jax.eval_shape(codec.encode, codec_params, image).shape[-1]
        fields = variants.expand(config["network"])
        fields |= {"in_channels": channels, "out_channels": channels}
        trailing = schedule.alphas_cumprod[-1] == 0
        options: dict[str, Any] = {
            "num_frames": data["num_frames"],
            "size": data["size"],
            "background": tuple(data.get("background", clips.WHITE)),
            "orbit": config.get("orbit", {}),
            "spacing": config.get("spacing", "trailing" if trailing else "leading"),
        }
        if "guidance" in config:
            guide = options["guidance"] = guidance.from_config(config["guidance"])
            if isinstance(guide, ThreeDAware):
                guide = dataclasses.replace(guide, w2=0.0)
            options["static_guidance"] = guide
        if "prompt" in config:
            options["prompt"] = registry.build("prompt", config["prompt"])
        return cls(
            network=registry.build("network", fields),
            params=params,
            codec=codec,
            codec_params=codec_params,
            schedule=schedule,
            prompt_params=prompt_params or {},
            **options,
        )

    @property
    def moves(self) -> bool:
        """Whether the network knows of motion; without, there is a static orbit only."""
        return getattr(self.network, "motion_embedding", True)

    def __call__(
        self,
        prompt: Prompt,
        *,
        motion: float = 8.0,
        num_steps: int = 50,
        seed: int = 0,
        caption: str = "",
        asset: OrbitClip | None = None,
        views: Sequence[str] = ("dynamic", "static"),
    ) -> OrbitClip:
        """Samples the dynamic and the static orbit of what the prompt shows or says.

        Args:
            prompt: as `prompt` of this pipeline asks: an image (h, w, 3 or 4) in [0, 1], of any
                size, with the object seen from the front, which without alpha should stand on
                white; or a sentence.
            motion: motion magnitude m of Eq. 1; 0 holds still.
            num_steps: calls of the sampler.
            seed: of the noise; the same seed gives the same clip on the same platform.
            caption: passed on to the clip; by default a prompt that is a sentence.
            asset: the static orbit of a 3D asset that is to move, by the cameras of this pipeline;
                for networks that read one (static-3D-to-4D), and only for them. It becomes the
                static orbit of the result.
            views: which orbits to sample.

        Raises:
            ValueError: a view is unknown, the prompt is of the other kind, the asset is missing,
                not wanted or of another length, an image has another number of channels, the
                motion is negative, or `num_steps` is not between 1 and the length of the
                schedule.
        """
        if unknown := sorted(set(views) - {"dynamic", "static"}):
            raise ValueError(f"The orbits are 'dynamic' and 'static', not {unknown[0]!r}.")
        if motion < 0:
            raise ValueError(f"The motion magnitude must be 0 or more; got {motion}.")
        orbit = cameras.orbit(self.num_frames, width=self.size, height=self.size, **self.orbit)
        spec = {"name": self.spacing, "train_steps": self.schedule.num_steps}
        timesteps = registry.build("timesteps", spec | {"num_steps": num_steps})
        conditioning = dataclasses.replace(
            self.prompt.encode(
                self.prompt_params, prompt, size=self.size, to_latents=self._to_latents
            ),
            camera=jnp.asarray(orbit.opengl_camera_to_world)[None],
        )
        image = jax.ShapeDtypeStruct((self.size, self.size, 4), jnp.float32)
        latent = jax.eval_shape(self.codec.encode, self.codec_params, image)
        noise = jax.random.normal(jax.random.key(seed), (self.num_frames, *latent.shape))
        if asset is not None or getattr(self.network, "static_channels", 0):
            conditioning = dataclasses.replace(conditioning, static=self._asset_latents(asset))
        networks = (self.network, self.static_network)
        sample = functools.partial(_sample, networks, self.codec, self.stepper)
        parameters = (self.params, self.static_params)
        inputs = (parameters, self.codec_params, self.schedule, noise)
        steps = tuple(timesteps.tolist())
        orbits = {"dynamic": (self.guidance, motion), "static": (self.static_guidance, 0.0)}
        if not self.moves:
            del orbits["dynamic"]
        fields: dict[str, Any] = {}
        if asset is not None:
            del orbits["static"]
            colour, alpha = self._asset_frames(asset, self.background)
            fields = {"static": colour, "static_alpha": alpha}
        for view, (guide, magnitude) in orbits.items():
            if view not in views:
                continue
            told = conditioning.with_motion(magnitude) if self.moves else conditioning
            frames = np.asarray(sample(guide, steps, *inputs, told))
            fields[view] = frames[..., :3]
            if frames.shape[-1] == 4:
                fields[f"{view}_alpha"] = frames[..., 3]
        return OrbitClip(
            camera=orbit,
            timestamps=np.linspace(0, 1, self.num_frames, dtype=np.float32),
            motion=motion if self.moves else None,
            caption=caption or (prompt if isinstance(prompt, str) else ""),
            background=self.background,
            **fields,
        )

    def _asset_latents(self, asset: OrbitClip | None) -> Float[Array, "1 t h w c"]:
        if not getattr(self.network, "static_channels", 0):
            raise ValueError("This model does not read a 3D asset; leave it out.")
        if asset is None or asset.static is None or asset.static_alpha is None:
            raise ValueError(
                "This model moves a 3D asset: pass its static orbit, with alpha, as `asset`."
            )
        if len(asset.static) != self.num_frames:
            raise ValueError(
                f"The orbit of the asset has {len(asset.static)} frames, but this model makes"
                f" {self.num_frames}."
            )
        colour, alpha = self._asset_frames(asset, clips.WHITE)
        frames = 2 * np.concatenate([colour, alpha[..., None]], axis=-1) - 1
        return self._to_latents(jnp.asarray(frames))[None]

    def _asset_frames(self, asset: OrbitClip, background: Color) -> tuple[np.ndarray, np.ndarray]:
        """The static orbit of an asset in this size on that background, and its alpha."""
        still = asset.resized(self.size, self.size)
        alpha = np.asarray(still.static_alpha, np.float32)
        change = np.asarray(background, np.float32) - np.asarray(still.background, np.float32)
        return np.asarray(still.static) + (1 - alpha[..., None]) * change, alpha

    def _to_latents(self, images: Float[Array, "b h w 4"]) -> Float[Array, "b h2 w2 c"]:
        return _encode(self.codec, self.codec_params, images)


_VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "tokenizer.json", "vocab.json")


def _from_folder(cls: type[OrbitPipeline], folder: Path) -> OrbitPipeline:
    weights = folder / "network.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} is no model and not the workdir of a training run: it has neither"
            " network.safetensors nor checkpoints."
        )
    config = _folder_config(folder, weights)
    params, codec_params = (
        conversion.load(folder / f"{name}.safetensors") for name in ("network", "codec")
    )
    return cls.from_parts(params, codec_params, config, load_prompt_params(folder))


def load_prompt_params(folder: str | os.PathLike) -> dict[str, PyTree]:
    """The parameters of CLIP's towers in a folder for `OrbitPipeline.load`, which may have none."""
    files = {name: Path(folder) / f"{name}.safetensors" for name in ("text", "image")}
    return {name: conversion.load(file) for name, file in files.items() if file.is_file()}


def save_folder(
    folder: str | os.PathLike,
    params: PyTree,
    codec_params: PyTree,
    config: Mapping[str, Any],
    *,
    base: str | os.PathLike | None = None,
) -> None:
    """Writes a folder for `OrbitPipeline.load`, in float32; it is there whole or not at all.

    Args:
        folder: to be made.
        params, codec_params, config: as `OrbitPipeline.from_parts` takes them.
        base: folder of a model with the same prompt encoder, whose files of it are copied.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it or choose another name.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, weights in (("network", params), ("codec", codec_params)):
        conversion.save(partial / f"{name}.safetensors", weights)
    own = dict(config)
    if base is not None and Path(base).is_dir():
        towers = [f"{name}.safetensors" for name in ("text", "image")]
        for name in (*towers, *_VOCABULARIES, "merges.txt"):
            if (Path(base) / name).is_file():
                shutil.copyfile(Path(base) / name, partial / name)
        prompt = own.get("prompt", {})
        vocabulary = Path(prompt.get("vocabulary") or "")
        if Path(base) in (vocabulary, *vocabulary.parents):  # it is found in the new folder then
            own["prompt"] = {key: prompt[key] for key in prompt if key != "vocabulary"}
    (partial / "model.json").write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def _folder_config(folder: Path, weights: Path) -> dict[str, Any]:
    own: dict[str, Any] = {"preset": read_metadata(weights).get("variant")}
    if (folder / "model.json").is_file():
        own = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    preset = own.pop("preset", None)
    if preset in PRESETS:
        own = {**PRESETS[preset], **own}
    elif preset is not None or "network" not in own:
        raise ValueError(
            f"{folder} does not say what its weights are ({preset!r}): write a model.json with"
            f' {{"preset": ...}}, one of {", ".join(PRESETS)}.'
        )
    prompt = dict(own.get("prompt", {}))
    found = [name for name in _VOCABULARIES if (folder / name).is_file()]
    if prompt.get("name") in ("text", "image_text") and found:
        # Of the pair vocab.json and merges.txt the folder is named.
        place = folder if found[0] == "vocab.json" else folder / found[0]
        own["prompt"] = {"vocabulary": str(place), **prompt}
    return own


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: Codec, params: PyTree, images: Array) -> Array:
    return codec.encode(params, images)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(
    networks: tuple[Any, Any],
    codec: Codec,
    stepper: Stepper,
    guide: Guidance,
    timesteps: tuple[int, ...],
    params: tuple[PyTree, PyTree],
    codec_params: PyTree,
    schedule: NoiseSchedule,
    noise: Array,
    conditioning: Conditioning,
) -> Array:
    """Frames (t, h, w, c) in [0, 1] of one orbit; the second network is the 3D-aware one."""
    (network, static_network), (own, static_own) = networks, params
    if static_network is not None and isinstance(guide, ThreeDAware):
        static_denoise = functools.partial(static_network.apply, {"params": static_own})
        guide = dataclasses.replace(guide, static_denoise=static_denoise)
    denoise = guide(functools.partial(network.apply, {"params": own}))
    latents = sampling.sample(
        denoise, schedule, stepper, noise[None], conditioning, timesteps=np.asarray(timesteps)
    )
    return jnp.clip((codec.decode(codec_params, latents[0]) + 1) / 2, 0, 1)
