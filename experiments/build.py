"""Turns a configuration into objects: the only place that knows both.

Network, codec and schedule are sub-configurations with a `name`, looked up in `d4d_jax.registry`
(or imported, when written "package.module:Attr"); their other keys are constructor arguments.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import d4d_jax
from d4d_jax import losses, registry
from d4d_jax.data.pipeline import ClipSource, make_dataset
from d4d_jax.models import unet, vae  # noqa: F401 (importing them registers their classes)
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.train.state import TrainState, create_state
from d4d_jax.train.step import LossFn, Metrics
from d4d_jax.typing import Codec, PyTree

Config = Mapping[str, Any]  # an ml_collections.ConfigDict, or the plain dict saved from one

#: The clips that are shipped with the package.
EMBEDDED_CLIPS = pathlib.Path(d4d_jax.__file__).parent / "assets" / "clips"


def build_schedule(config: Config) -> NoiseSchedule:
    """Returns the noise schedule; raises ValueError for a wrong name or argument."""
    return registry.build("schedule", config["schedule"])


def build_codec(config: Config) -> Codec:
    """Returns the latent codec (its parameters are arrays of the run); raises as above."""
    return registry.build("codec", config["codec"])


def build_network(config: Config, channels: int) -> Any:
    """Returns the network for latents with that many channels; raises as above."""
    sizes = {"in_channels": channels, "out_channels": channels}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config["network"].items()}
    return registry.build("network", {**fields, **sizes})


def latent_channels(codec: Codec, codec_params: PyTree, batch: PyTree) -> int:
    """Returns the number of channels of the latents of a batch; nothing is computed."""
    return jax.eval_shape(codec.encode, codec_params, batch["dynamic"]).shape[-1]


def build_source(config: Config) -> ClipSource:
    """Returns the clips of `data.path`, or the shipped ones when that is empty.

    Raises FileNotFoundError or ValueError, naming the folder or file, when it has no usable clips.
    """
    return ClipSource(config["data"]["path"] or EMBEDDED_CLIPS, size=config["data"]["size"])


def build_dataset(config: Config) -> grain.IterDataset:
    """Returns the endless dataset of batches, without the captions; raises as `build_source`."""
    data = config["data"]
    dataset = make_dataset(
        data["path"] or EMBEDDED_CLIPS,
        batch_size=config["batch_size"],
        seed=config["seed"],
        size=data["size"],
        static_probability=data["static_probability"],
    )
    return dataset.map(lambda batch: {k: v for k, v in batch.items() if k != "caption"})


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns clipped AdamW with a linear warm-up and the wanted decay.

    With `decay="cosine"` the rate reaches 0 at `num_steps`: a run that is continued with more
    steps follows the longer curve from where it stands. Raises ValueError for another name.
    """
    options = config["optimizer"]
    peak, warmup = options["learning_rate"], options["warmup_steps"]
    if options["decay"] == "cosine":
        length = max(config["num_steps"], warmup + 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, length)
    elif options["decay"] == "constant":
        rate = optax.warmup_constant_schedule(0.0, peak, warmup)
    else:
        raise ValueError(f"decay must be 'cosine' or 'constant', not {options['decay']!r}.")
    return optax.chain(
        optax.clip_by_global_norm(options["clip_norm"]),
        optax.adamw(rate, weight_decay=options["weight_decay"]),
    )


def build_loss(config: Config, network: Any, codec: Codec, schedule: NoiseSchedule) -> LossFn:
    """Returns L_ldm + omega L_mr of a batch of `build_dataset`, with random prompt dropout."""
    options = config["loss"]

    def loss_fn(params: PyTree, frozen: PyTree, batch: PyTree, key: Array) -> tuple[Array, Metrics]:
        size = batch["motion"].shape
        time_key, noise_key, prompt_key, motion_key, dropout_key = jax.random.split(key, 5)
        latents = codec.encode(frozen["codec"], batch["dynamic"])
        static_latents = codec.encode(frozen["codec"], batch["static"])
        timestep = draw_timesteps(time_key, size, schedule.num_steps, options["timestep_shift"])
        noise = jax.random.normal(noise_key, latents.shape)
        conditioning = Conditioning(
            image=latents[:, 0],
            camera=batch["camera"],
            motion=batch["motion"],
            drop_prompt=jax.random.bernoulli(prompt_key, options["drop_prompt"], size),
            drop_motion=jax.random.bernoulli(motion_key, options["drop_motion"], size),
        )
        prediction = network.apply(
            {"params": params},
            schedule.add_noise(latents, noise, timestep),
            timestep,
            conditioning,
            train=True,
            rngs={"dropout": dropout_key},
        )
        terms = losses.diffusion_losses(
            schedule,
            prediction,
            latents,
            noise,
            timestep,
            static_latents,
            omega=options["omega"],
            snr_power=options["snr_power"],
        )
        return terms.pop("loss"), terms

    return loss_fn


def draw_timesteps(key: Array, shape: tuple[int, ...], num_steps: int, shift: float) -> Array:
    """Returns random timesteps in [0, num_steps), int32; a `shift` above 1 favours noisy ones.

    u becomes shift u / (1 + (shift - 1) u), as in Esser et al. 2024 (arXiv 2403.03206); with
    shift 1 they are uniform. The noisiest steps decide what a sampled clip shows.
    """
    u = jax.random.uniform(key, shape)
    u = shift * u / (1.0 + (shift - 1.0) * u)
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def fit_codec(config: Config, codec: Codec) -> PyTree:
    """Returns the codec's parameters, fitted to every dynamic and static frame of the clips.

    A codec without a `fit` method has none. Raises as `build_source`, and ValueError when the
    frames do not suit the codec.
    """
    if not hasattr(codec, "fit"):
        return {}
    source = build_source(config)
    frames = [source[i][view] for i in range(len(source)) for view in ("dynamic", "static")]
    return codec.fit(np.concatenate(frames))


def init_state(
    config: Config, network: Any, codec: Codec, codec_params: PyTree, batch: PyTree
) -> TrainState:
    """Returns the state before the first step, for batches shaped like `batch`.

    A network whose sizes do not fit the latents raises ValueError here, before any compute.
    """
    init_key, run_key = jax.random.split(jax.random.key(config["seed"]))

    def init(key: Array, codec_params: PyTree, batch: PyTree) -> PyTree:
        latents = codec.encode(codec_params, batch["dynamic"])
        timestep = jnp.zeros(latents.shape[:1], jnp.int32)
        conditioning = Conditioning(
            image=latents[:, 0], camera=batch["camera"], motion=batch["motion"]
        )
        return network.init(key, latents, timestep, conditioning)["params"]

    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    params = jax.jit(init)(init_key, codec_params, one)
    return create_state(params, build_optimizer(config), run_key, {"codec": codec_params})
